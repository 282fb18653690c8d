"""What NEO and its peers cost, measured by one harness: `make bench`."""
