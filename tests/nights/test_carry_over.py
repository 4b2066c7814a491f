"""Which rows are carried, which are asked about, and which are classified."""

from collections import Counter

import pytest

from tests.builders.etag_server import EtagServer
from tests.builders.models import small_bundle
from tests.nights.conftest import Nights, picture

FIRST, SECOND, THIRD = "2026-11-19", "2026-11-20", "2026-11-21"


def test_rows_with_validators_are_carried_without_a_request(nights: Nights, server: EtagServer) -> None:
    paths = [f"/{number}.png" for number in range(6)]
    server.images = {path: picture(number) for number, path in enumerate(paths)}
    uris = [server.url(path) for path in paths]
    nights.list_images(uris, etag=["a", "b", "c", "d", "e", "f"], publisher=list(range(6)))
    assert nights.make(FIRST) == 0
    assert server.answers == {200: 6}
    server.forget()
    nights.list_images(uris, etag=["a", "b", "c", "d", "e", "f"], publisher=list(range(10, 16)))
    assert nights.make(SECOND, "--engine", "ray", "--ray-address", "nowhere:1") == 0
    assert not server.asked
    assert set(nights.carried(SECOND).values()) == {FIRST}
    assert [row["publisher"] for row in nights.rows(SECOND)] == list(range(10, 16))
    first, second = nights.rows(FIRST), nights.rows(SECOND)
    for row in (*first, *second):
        row.pop("publisher"), row.pop("carried_from"), row.pop("run_id")
    assert first == second
    assert nights.report(SECOND)["night"]["images"] == {
        "new": 0, "carried": 6, "carried_failure": 0, "changed": 0, "asked": 0, "retried": 0, "removed": 0,
    }  # fmt: skip


def test_a_changed_validator_is_fetched_and_known_bytes_are_not_classified_again(
    nights: Nights, server: EtagServer
) -> None:
    server.images = {"/1.png": picture(1), "/2.png": picture(2), "/3.png": picture(3)}
    uris = [server.url(path) for path in server.images]
    nights.list_images(uris, etag=["a", "b", "c"])
    assert nights.make(FIRST) == 0
    server.images["/2.png"] = picture(4)
    server.images["/copy.png"] = picture(1)
    nights.list_images([*uris[1:], server.url("/copy.png")], etag=["b2", "c", "d"])
    assert nights.make(SECOND) == 0
    assert nights.carried(SECOND) == {
        server.url("/2.png"): None, server.url("/3.png"): FIRST, server.url("/copy.png"): FIRST,
    }  # fmt: skip
    about = nights.report(SECOND)["night"]
    assert about["rows"] == {"carried": 1, "not_modified": 0, "same_bytes": 1, "tonight": 1}
    assert (about["images"]["new"], about["images"]["changed"], about["images"]["removed"]) == (1, 1, 1)


def test_a_server_is_asked_and_its_304_is_a_carried_row(nights: Nights, server: EtagServer) -> None:
    server.images = {f"/{number}.png": picture(number) for number in range(8)}
    server.dates = {"/7.png": "Wed, 21 Oct 2015 07:28:00 GMT"}
    uris = [server.url(path) for path in server.images]
    nights.list_images([*uris, uris[0], server.url("/gone.png")], image_id=[str(n) for n in range(10)])
    assert nights.make(FIRST) == 0
    for day in (SECOND, THIRD):
        server.forget()
        assert nights.make(day) == 0
        assert server.answers == {304: 8}  # and not_found is carried
        assert set(nights.carried(day).values()) == {FIRST}
        assert nights.results(day) == nights.results(FIRST)
        assert nights.report(day)["night"]["rows"]["not_modified"] == 9
    assert nights.make(THIRD) == 0
    server.images["/3.png"] = picture(33)
    server.forget()
    assert nights.make("2026-11-22") == 0
    assert server.answers == {304: 7, 200: 1}
    assert Counter(nights.carried("2026-11-22").values()) == {FIRST: 9 - 1, None: 1}


def test_failures_are_carried_for_some_nights_and_passing_ones_tried_again(
    nights: Nights, server: EtagServer
) -> None:
    server.images = {"/html.png": b"<html>no picture</html>"}
    uris = [server.url("/gone.png"), server.url("/html.png"), "http://127.0.0.2:9/refused.png"]
    nights.list_images(uris)
    settings = ["--keep-failures", "2", "--retry-passes", "0"]
    assert nights.make(FIRST, *settings) == 0
    server.forget()
    assert nights.make(SECOND, *settings) == 0
    assert not server.asked
    assert nights.carried(SECOND) == {uris[0]: FIRST, uris[1]: FIRST, uris[2]: None}
    assert nights.make(THIRD, *settings) == 0
    assert Counter(server.asked) == {"/gone.png": 1, "/html.png": 1}
    assert set(nights.carried(THIRD).values()) == {None}
    statuses = {row["uri"]: row["status"] for row in nights.rows(THIRD)}
    assert list(statuses.values()) == ["not_an_image" if "html" in uri else statuses[uri] for uri in statuses]


def test_a_host_with_random_etags_is_ignored_and_named(
    nights: Nights, server: EtagServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.images = {f"/{number}.png": picture(number) for number in range(12)}
    random = [server.url(path, "random") for path in server.images]
    plain = [server.url(path, "plain") for path in server.images]
    nights.list_images(random + plain)
    assert nights.make(FIRST) == 0
    assert nights.make(SECOND) == 0
    host = random[0].split("/")[2]
    (found,) = nights.report(SECOND)["night"]["unreliable_hosts"]
    assert found == {"host": host, "images": 12, "unreliable": 12}
    assert f"{host} changes its validators" in caplog.text
    assert nights.report(SECOND)["night"]["rows"]["same_bytes"] == 24
    assert nights.results(SECOND) == nights.results(FIRST)


def test_a_new_model_begins_anew_and_the_old_one_finds_its_results_again(
    nights: Nights, server: EtagServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server.images = {f"/{number}.png": picture(number) for number in range(4)}
    nights.list_images([server.url(path) for path in server.images])
    assert nights.make(FIRST) == 0
    old, nights.bundle = nights.bundle, tmp_path_factory.mktemp("other") / "bundle"
    small_bundle(nights.bundle, thresholds={"483": 0.1})
    assert nights.make(SECOND) == 0
    assert set(nights.carried(SECOND).values()) == {None}
    nights.bundle = old
    server.images["/4.png"] = picture(4)
    nights.list_images([server.url(path) for path in server.images])
    assert nights.make(THIRD) == 0
    assert Counter(nights.carried(THIRD).values()) == {FIRST: 4, None: 1}
