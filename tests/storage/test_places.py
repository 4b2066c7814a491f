"""What an inventory may read: spellings that look like its own place and are another's do not pass."""

import pytest

from pipelines.storage.places import Places, place_of


@pytest.mark.parametrize(
    ("base", "allowed", "location", "permitted"),
    [
        ("/data/in", (), "/data/in/a.jpg", True),
        ("/data/in", (), "/data/in/../secret", False),
        ("/data/in", (), "/data/inner/a.jpg", False),
        ("/data/in", (), "file:///data/in/%2e%2e/secret", False),
        ("/data/in", (), "file:///data/in/?/../../../etc/passwd", False),
        ("/data/in", (), "FILE://localhost/data/in/a.jpg", True),
        ("/data/in", (), "local:///data/in/a.jpg", False),
        ("/data/in", (), "~/.ssh/id_rsa", False),
        ("/data/in", (), "~root/.ssh/id_rsa", False),
        ("/data/in", (), "HTTPS://a.example/x.jpg", True),
        ("/data/in", (), "hf://datasets/a/b.jpg", False),
        ("/data/in", (), "simplecache::s3://b/k", False),
        ("/data/in", (), "data:image/png;base64,xx", True),
        ("/data/in", ("/",), "/etc/passwd", True),
        ("/data/in", ("/mnt/images/",), "/mnt/images/a.jpg", True),
        ("/data/in", ("s3://b/one/",), "s3://b/one/a.jpg", True),
        ("/data/in", ("s3://b/one/",), "s3://b/one/../two/a.jpg", False),
        ("/data/in", ("s3://",), "s3a://any/a.jpg", True),
        ("s3://b/lists", (), "s3://b/images/a.jpg", True),
        ("s3://b/lists", (), "s3a://b/images/a.jpg", True),
        ("s3://b/lists", (), "s3://b/../other/a.jpg", False),
        ("s3://b/lists", (), "s3://bucket/a.jpg", False),
        ("s3://b/lists", (), "/etc/passwd", False),
        ("abfss://c@account/lists", (), "abfss://c@account/a.jpg", True),
        ("https://a.example/lists", (), "/etc/passwd", False),
    ],
)
def test_what_is_permitted(base: str, allowed: tuple[str, ...], location: str, permitted: bool) -> None:
    assert Places.of(base, allowed).permit(location) is permitted
    if not permitted:
        assert Places.of(base, (*allowed, place_of(location))).permit(location)
