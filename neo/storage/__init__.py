"""The storage node: keeps cells of the partition table in a database.

`app.StorageNode` is its life; `initialization` and `operation` are its phases;
`transactions` and `locks` decide, in memory, what `writer` makes durable in groups;
`database` is the interface over SQL. Needs no ZODB.
"""
