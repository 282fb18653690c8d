"""NEO: a distributed, redundant and transactional storage for ZODB.

`lib` is what all nodes share, `master`, `storage`, `admin` and `client` are the nodes,
`scripts` the commands. docs/architecture.rst is the map. Importing a package has no
side effect.
"""
