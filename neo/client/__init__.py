"""Client of a NEO cluster: a storage for ZODB (`neo.client.Storage.Storage`)."""
