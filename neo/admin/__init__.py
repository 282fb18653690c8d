"""The admin node: relays `neoctl` to the primary master, and tells what it knows."""
