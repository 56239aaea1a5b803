"""What may be shown: text without the secrets in its URLs."""

import re
from urllib.parse import unquote

# `name:password` may hold spaces up to its @. Otherwise a URL ends at white space, or where a quote
# or a bracket parts it from the next one, as in a list.
_URL = re.compile(
    r"""(?ix) (?P<web> \b https?: )? //
    (?P<rest>
        (?: [^/\s:@]+ : (?!\d{1,5}\b) [^\s/@] [^\n"'<>@/]{0,99} @ )?
        (?: (?! ["',;<>()\[\]{}|]{1,9} [a-z][a-z0-9+.-]{1,29}:// ) \S )*
    )"""
)
_HOST_AND_PORT = re.compile(r"\[[^\]]*\](:\d*)?|[^:]*:\d{1,5}")

_PARAMETER = re.compile(r"""([?&;#])([\w.%~$\[\]-]+)=((?:[^&\s"'<>]|'(?=\w))+)""")
_SECRET = re.compile(
    r"""(?ix) token | secret | passw | passphrase | (?<![a-z])pass(?![a-z]) | pwd | credential
    | signature | sig(?![a-z]) | (?<![a-z])sign(?![a-z]) | hmac | jwt | policy | session | ticket
    | auth(?!or(?!i)) | key(?![a-z]) | access.?(key|id) | (?<![a-z])sas(?![a-z]) | ^hdn | ^code$
    | (?<![a-z]) (?: md5 | hash | verify | hm ) (?![a-z])"""
)


def redact(text: str) -> str:
    """Returns a text without the user names, passwords, signatures and tokens of its URLs.

    Everything that may hold an address goes through here before it is shown. In doubt too much is
    removed: a password may hold an `@` or a slash.
    """
    return _PARAMETER.sub(_without_secret, _URL.sub(_without_user, text))


def holds_secret(url: str) -> bool:
    """Tells whether a URL holds anything that `redact` removes."""
    return redact(url) != url


def _without_user(url: re.Match[str], deeper: int = 3) -> str:
    web, rest = url["web"] or "", url["rest"]
    authority = rest.split("/", 1)[0]
    user, at, _ = authority.partition("@")
    if ":" in user and "@" in rest and (at or not _is_host(web, authority)):
        return f"{web}//{rest[rest.rindex('@') + 1 :]}"
    path = rest[len(authority) :]  # which may hold another URL
    if deeper:
        path = _URL.sub(lambda inner: _without_user(inner, deeper - 1), path)
    return f"{web}//{authority[authority.rfind('@') + 1 :]}{path}"


def _is_host(web: str, authority: str) -> bool:
    """Tells a host with its port from a name with the first digits of a password.

    Only in the address of a database may a password hold a slash.
    """
    may_be = web or authority.startswith("[")
    return bool(may_be and _HOST_AND_PORT.fullmatch(authority))


def _without_secret(parameter: re.Match[str]) -> str:
    mark, name, value = parameter.groups()
    return f"{mark}{name}={'...' if _SECRET.search(unquote(name)) else value}"
