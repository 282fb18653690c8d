"""What an application may get from a storage, besides what ZODB itself defines.

Source: operations.md 13.2. What can be repeated (the transaction is certainly not
committed, and trying again makes sense) is a TransientError, which transaction managers
retry.
"""

from __future__ import annotations

from transaction.interfaces import TransientError
from ZODB import POSException


class NEOStorageError(POSException.StorageError):  # type: ignore[misc]  # no annotations
    """Base of errors that are no conflict."""


class NEOStorageTransientError(NEOStorageError, TransientError):  # type: ignore[misc]  # no annotations
    """The cluster could not serve now; nothing was committed, repeating may help."""


class NEOPrimaryMasterLost(POSException.ReadConflictError):  # type: ignore[misc]  # no annotations
    """The snapshot that was being read does not exist any more."""


class NEOStorageNotFoundError(NEOStorageError):
    """There is no such revision or transaction."""


class NEOStorageDoesNotExistError(NEOStorageNotFoundError):
    """The object has no revision at all."""


class NEOStorageCreationUndoneError(NEOStorageDoesNotExistError):
    """The revision has no data: deleted, or creation undone."""


class NEOStorageWrongChecksum(NEOStorageError):
    """All copies of a revision are damaged: (oid, tid)."""


class NEOUndoPackError(NEOStorageNotFoundError):
    """What would be restored by an undo was packed meanwhile."""


class NEOStorageUnknownOutcome(NEOStorageError):
    """Whether the transaction is committed could not be found out."""
