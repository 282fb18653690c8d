"""TLS: one set of credentials for all connections of a node.

The handshake and the records go through memory (`ssl.MemoryBIO`), so that whoever owns
the socket moves bytes only.
"""

from __future__ import annotations

import ssl

from .exception import ConfigurationError

CIPHERS = (
    "@SECLEVEL=2:ECDH+AESGCM:ECDH+CHACHA20:ECDH+AES:DHE+AES"
    ":!aNULL:!eNULL:!aDSS:!SHA1:!AESCCM"
)
CLIENT_HELLO = 0x16  # first byte of a TLS stream
ALERT = b"\x15\x03\x01\x00\x02\x02\x28"  # fatal: handshake failure
RECORD = 1 << 16


class TLS:
    """Credentials: files in PEM format of the authority, own certificate, own key.

    Peers must present a certificate of the same authority, whatever its name; what the
    file of the authority revokes (CRL) is refused. Source: operations.md 7.
    """

    def __init__(self, ca: str, cert: str, key: str) -> None:
        self.files = (ca, cert, key)
        try:
            self._client = self._context(ssl.PROTOCOL_TLS_CLIENT)
            self._server = self._context(ssl.PROTOCOL_TLS_SERVER)
            self._self_test()
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise ConfigurationError(
                f"TLS credentials (ca={ca}, cert={cert}, key={key}): {explain(error)}"
            ) from None

    def _context(self, protocol: int) -> ssl.SSLContext:
        ca, cert, key = self.files
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_CIPHER_SERVER_PREFERENCE
        context.set_ciphers(CIPHERS)
        for path in self.files:
            with open(path, "rb"):  # names the file, where ssl's error doesn't
                pass
        context.load_verify_locations(ca)
        context.load_cert_chain(cert, key)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if context.cert_store_stats()["crl"]:
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        return context

    def _self_test(self) -> None:
        """Shake hands with oneself: the key fits and the authority signed."""
        client, server = self.wrap(False), self.wrap(True)
        for _ in range(10):
            server.incoming.write(client.outgoing.read())
            client.incoming.write(server.outgoing.read())
            done = [stream.handshake() for stream in (client, server)]
            if all(done):
                return
        raise ValueError("the self-test does not end")

    def wrap(self, server_side: bool) -> TLSStream:
        """A new session."""
        return TLSStream(self._server if server_side else self._client, server_side)


class TLSStream:
    """One session: `incoming` and `outgoing` are the encrypted bytes."""

    def __init__(self, context: ssl.SSLContext, server_side: bool) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self._session = context.wrap_bio(
            self.incoming, self.outgoing, server_side=server_side
        )
        self.ready = False

    def handshake(self) -> bool:
        """Go on with the handshake; true when it is over. Raises ssl.SSLError."""
        if not self.ready:
            try:
                self._session.do_handshake()
            except ssl.SSLWantReadError:
                return False
            self.ready = True
        return True

    def write(self, data: bytes) -> None:
        """Encrypt."""
        if data:
            self._session.write(data)

    def read(self) -> bytes:
        """Decrypt what came; b"" without a complete record. Raises ssl.SSLError."""
        chunks = []
        while True:
            try:
                chunk = self._session.read(RECORD)
            except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
                break
            if not chunk:
                break
            chunks.append(chunk)
        return b"".join(chunks)


def explain(error: Exception) -> str:
    """What is wrong, in words an operator can use."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        hints = {
            "KEY_VALUES_MISMATCH": "the key does not belong to the certificate",
            "WRONG_VERSION_NUMBER": "the peer does not speak TLS",
            "TLSV1_ALERT_UNKNOWN_CA": "the peer does not trust our certificate",
            "NO_CERTIFICATE_OR_CRL_FOUND": "the file of the authority has none",
        }
        return hints.get(reason, reason.replace("_", " ").lower())
    return str(error)
