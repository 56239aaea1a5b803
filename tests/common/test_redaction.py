import pytest

from minigpt.common.redaction import redact


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hunter2@host:5000/a", "http://host:5000/a"),
        ("postgresql://me:hun/ter2@host/db failed", "postgresql://host/db failed"),
        ("http://hunter2@host and https://a:hunter2@b", "http://host and https://b"),
        (
            "mysql://host/db?user=me&password=hunter2&x=1",
            "mysql://host/db?user=me&password=...&x=1",
        ),
        ("https://example.org/a@b.tar.gz", "https://example.org/a@b.tar.gz"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
    ],
)
def test_credentials_in_a_url_are_removed(text: str, shown: str) -> None:
    assert redact(text) == shown
