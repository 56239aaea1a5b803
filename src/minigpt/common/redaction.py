"""What may be shown: text without the credentials in its URLs."""

import re


def redact(text: str) -> str:
    """Removes user names, passwords and tokens from the URLs in a text."""
    text = re.sub(r"//([^/\s:@]*:[^\s@]*|[^/\s]*)@", "//", text)  # a password may hold a slash
    return re.sub(r"(?i)([?&;](?:password|passwd|pwd|token|sig)=)[^&;\s]+", r"\1...", text)
