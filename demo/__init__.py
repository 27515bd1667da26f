"""The small world: captioned pictures and a tiny model, both made here, both real."""
