"""From record to picture: trains one expert on its timestep range, and draws with a pair."""
