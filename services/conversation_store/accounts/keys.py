"""What a key is stored as, and which one is the operator's own; pure."""

import hashlib
import hmac


class Keys:
    """Knows the bootstrap key, and turns any other key's digest into what is stored of it."""

    def __init__(self, bootstrap_key: str, pepper: str) -> None:
        self._bootstrap_digest = hashlib.sha256(bootstrap_key.encode()).hexdigest()
        self._pepper = pepper.encode()

    def is_bootstrap(self, digest: str) -> bool:
        """It is the operator's own key."""
        return hmac.compare_digest(self._bootstrap_digest, digest)

    def mac(self, digest: str) -> str:
        """HMAC-SHA256 of a key's digest under the pepper: of no use to who only has the database."""
        return hmac.new(self._pepper, digest.encode(), hashlib.sha256).hexdigest()
