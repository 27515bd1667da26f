"""What we claim about speed, as programs that measure it; imported by nobody."""
