"""Client of a NEO cluster: a storage for ZODB (`neo.client.Storage.Storage`).

Core: `app`, `handlers`, `reader`, `oids`, `iterator`, `first_phase`, `transactions`,
`outcome`, `undo`, with what they use (`answers`, `cache`, `metadata`, `turns`,
`ahead`). Around it: `shell` (threads, sockets) and `Storage` with `importing`,
`records` and `facade`; `config` and `zodburi` make storages from texts.
"""
