"""What all nodes share: the protocol, connections, the Runtime and its epoll loop,
tables of nodes and partitions, options, logs. Imports nothing of the nodes."""
