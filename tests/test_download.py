"""`gengram-data download` against a real server on this machine that breaks off, lies and
refuses."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from tests.download_checks import check_refused, left, md5

pytest_plugins = ["tests.download_fixtures"]

ROOT = Path(__file__).parent.parent
BODY = random.Random(1).randbytes(1_000_000)
OTHER = random.Random(2).randbytes(1_000_000)
COMMAND = [sys.executable, "-c", "from data_prep.cli import main; main()", "download", "list.yaml"]


def test_files_arrive_whole_and_are_recorded(server, download):
    server.add("a.fa.gz", BODY)
    server.add("dir/b.gff", OTHER)
    files = [
        {"url": f"{server.url}/a.fa.gz", "md5": md5(BODY).upper()},
        {"url": f"{server.url}/dir/b.gff", "name": "c.gff"},
    ]
    code, said, _ = download(files=files)
    assert code == 0
    assert "fetched 2 files (2.0 MB) into out" in said
    assert Path("out/a.fa.gz").read_bytes() == BODY
    assert Path("out/c.gff").read_bytes() == OTHER
    assert left() == ["a.fa.gz", "c.gff", "downloads.json"]
    record = json.loads(Path("out/downloads.json").read_text())["files"]
    assert record["a.fa.gz"] == {
        "url": f"{server.url}/a.fa.gz",
        "bytes": len(BODY),
        "md5": md5(BODY),
        "sha256": hashlib.sha256(BODY).hexdigest(),
    }
    assert record["c.gff"]["sha256"] == hashlib.sha256(OTHER).hexdigest()


def test_a_file_that_is_there_is_not_fetched_again(server, download):
    server.add("a", BODY)
    server.add("b", OTHER)
    files = [{"url": f"{server.url}/{name}"} for name in "ab"]
    download(files=files[:1])
    code, said, _ = download(files=files)
    assert code == 0 and "fetched 1 file " in said and "1 of 2 were there already" in said
    assert server.gets["/a"] == server.gets["/b"] == 1


def test_a_damaged_or_outdated_file_is_fetched_again(server, download):
    page = server.add("a", BODY)
    files = [{"url": f"{server.url}/a", "md5": md5(BODY)}]
    download(files=files)
    Path("out/a").write_bytes(BODY[:-1])
    assert download(files=files)[0] == 0
    assert Path("out/a").read_bytes() == BODY
    page.body = OTHER
    assert download(files=[{"url": f"{server.url}/a", "md5": md5(OTHER)}])[0] == 0
    assert Path("out/a").read_bytes() == OTHER


def test_a_connection_that_breaks_is_gone_on_with(server, download):
    page = server.add("a", BODY, cut_after=300_000, cuts=2)
    assert download(files=[{"url": f"{server.url}/a", "md5": md5(BODY)}])[0] == 0
    assert Path("out/a").read_bytes() == BODY
    starts = [headers.get("Range") for headers in page.asked]
    assert starts[0] is None and len(starts) == 3
    assert all(re.match(r"bytes=[1-9]\d{5}-$", start) for start in starts[1:])


def test_more_breaks_than_retries_are_no_harm_while_bytes_come(server, download):
    server.add("a", BODY, cut_after=100_000)
    assert download(files=[{"url": f"{server.url}/a"}], retries=1)[0] == 0
    assert Path("out/a").read_bytes() == BODY


@pytest.mark.parametrize("faults", [{"ranges": False}, {"etag": None}])
def test_without_ranges_or_versions_a_file_starts_anew(server, download, faults):
    page = server.add("a", BODY, cut_after=300_000, cuts=2, **faults)
    assert download(files=[{"url": f"{server.url}/a"}])[0] == 0
    assert Path("out/a").read_bytes() == BODY
    assert len(page.asked) == 3


def test_a_server_that_always_breaks_off_at_one_place_is_given_up(server, download):
    page = server.add("a", BODY, ranges=False, cut_after=300_000)
    result = download(files=[{"url": f"{server.url}/a"}])
    check_refused(result, r"/a broke off after \S+ bytes, 4 times in a row: .*; run the same")
    assert len(page.asked) <= 5
    page.ranges, page.cut_after = True, None
    assert download(files=[{"url": f"{server.url}/a"}])[0] == 0
    assert Path("out/a").read_bytes() == BODY
    assert "Range" in page.asked[-1]


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_a_file_that_changed_between_two_tries_is_not_mixed(server, download, heeds_if_range):
    page = server.add("a", BODY, cut_after=300_000, heeds_if_range=heeds_if_range)
    download(files=[{"url": f"{server.url}/a"}], retries=0)
    page.body, page.etag, page.cut_after = OTHER, '"2"', None
    assert download(files=[{"url": f"{server.url}/a"}])[0] == 0
    assert Path("out/a").read_bytes() == OTHER


def test_a_partial_that_was_already_whole_is_only_verified(server, download):
    server.add("a", BODY)
    files = [{"url": f"{server.url}/a", "md5": md5(BODY)}]
    Path("out").mkdir()
    Path("out/a.partial").write_bytes(BODY)
    Path("out/a.partial.json").write_text(json.dumps({"url": files[0]["url"], "version": '"1"'}))
    assert download(files=files)[0] == 0
    assert Path("out/a").read_bytes() == BODY
    assert left() == ["a", "downloads.json"]


def test_a_partial_with_other_bytes_is_thrown_away(server, download):
    server.add("a", BODY)
    files = [{"url": f"{server.url}/a", "md5": md5(BODY)}]
    Path("out").mkdir()
    Path("out/a.partial").write_bytes(OTHER[:400_000])
    Path("out/a.partial.json").write_text(json.dumps({"url": files[0]["url"], "version": '"1"'}))
    assert download(files=files)[0] == 0
    assert Path("out/a").read_bytes() == BODY


def test_a_partial_longer_than_the_file_is_thrown_away(server, download):
    server.add("a", BODY)
    Path("out").mkdir()
    Path("out/a.partial").write_bytes(OTHER + BODY)
    version = {"url": f"{server.url}/a", "version": '"1"'}
    Path("out/a.partial.json").write_text(json.dumps(version))
    assert download(files=[{"url": f"{server.url}/a"}])[0] == 0
    assert Path("out/a").read_bytes() == BODY


def test_a_busy_server_is_asked_again(server, download):
    server.add("a", BODY, busy=2)
    assert download(files=[{"url": f"{server.url}/a"}])[0] == 0
    assert Path("out/a").read_bytes() == BODY


def test_a_server_that_stays_busy_is_given_up(server, download):
    server.add("a", BODY, busy=100)
    check_refused(download(files=[{"url": f"{server.url}/a"}]), "answers with status 503; try")


def test_a_size_that_is_not_told_is_no_obstacle(server, download):
    server.add("a", BODY, length=False)
    code, said, _ = download("--dry-run", files=[{"url": f"{server.url}/a"}])
    assert code == 0 and "1 of them to fetch: 0 bytes and 1 file of unknown size" in said
    assert download(files=[{"url": f"{server.url}/a"}])[0] == 0
    assert Path("out/a").read_bytes() == BODY


def test_a_dry_run_writes_nothing(server, download):
    server.add("a.fa.gz", BODY)
    code, said, _ = download("--dry-run", files=[{"url": f"{server.url}/a.fa.gz"}])
    assert code == 0
    assert "a.fa.gz" in said and "1.0 MB" in said
    assert not Path("out").exists() and not server.gets


def test_out_and_parallel_win_over_the_file(server, download):
    for number in range(5):
        server.add(f"f{number}", BODY[number:])
    files = [{"url": f"{server.url}/f{number}"} for number in range(5)]
    assert download("--out", "2024", "--parallel", "3", files=files)[0] == 0
    assert all(Path(f"2024/f{number}").read_bytes() == BODY[number:] for number in range(5))
    assert not Path("out").exists()


@pytest.mark.parametrize("status", [400, 403, 404, 405, 500])
@pytest.mark.parametrize("faults", [{}, {"ranges": False}, {"range_status": 403}])
def test_a_server_that_refuses_head_is_asked_otherwise(server, download, status, faults):
    server.add("a", BODY, head_status=status, **faults)
    server.add("empty", b"", head_status=status, **faults)
    files = [{"url": f"{server.url}/{name}"} for name in ("a", "empty")]
    code, said, _ = download("--dry-run", files=files)
    assert code == 0 and "2 of them to fetch: 1.0 MB" in said and "unknown" not in said
    assert download(files=files)[0] == 0
    assert Path("out/a").read_bytes() == BODY and Path("out/empty").read_bytes() == b""


@pytest.mark.parametrize(("head", "get"), [(403, 404), (404, 403), (405, 410)])
def test_what_get_is_refused_with_is_told(server, download, head, get):
    server.add("a", BODY, head_status=head, status=get)
    server.add("b", BODY)
    files = [{"url": f"{server.url}/{name}"} for name in "ab"]
    check_refused(download(files=files), rf"/a .*\(status {get}\)")
    assert not Path("out").exists()


def test_what_does_not_exist_is_refused_before_anything_is_fetched(server, download):
    server.add("a", BODY)
    files = [{"url": f"{server.url}/{name}"} for name in ("a", "missing")]
    check_refused(download(files=files), r"/missing does not exist \(status 404\); correct it")
    assert not Path("out").exists()


def test_a_wrong_checksum_is_refused_and_the_others_still_come(server, download):
    server.add("a", BODY)
    server.add("b", OTHER)
    files = [
        {"url": f"{server.url}/a", "sha256": hashlib.sha256(OTHER).hexdigest()},
        {"url": f"{server.url}/b"},
    ]
    check_refused(download(files=files), r"/a has sha256 \w{64} and not \w{64}; the file has")
    assert left() == ["b", "downloads.json"]


def test_a_server_that_is_not_there(download):
    files = [{"url": "http://127.0.0.1:9/a"}]
    check_refused(download(files=files, retries=1), r"127.0.0.1:9/a cannot be reached: .*refused")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_fetched(
    server, download, monkeypatch
):
    server.add("a", BODY)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2_000_000, 1_100_000, 900_000))
    result = download(files=[{"url": f"{server.url}/a"}])
    check_refused(result, r"out has 900.0 kB of free space, but 1.0 MB are .*; make room")
    assert not server.gets


def test_a_disk_that_fills_up_is_a_sentence_and_the_next_run_goes_on(server, download, monkeypatch):
    page = server.add("a", BODY)
    files = [{"url": f"{server.url}/a"}]
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.download.fetch.flush", _no_space)
        check_refused(download(files=files), "a could not be written: No space left on device")
    assert download(files=files)[0] == 0
    assert Path("out/a").read_bytes() == BODY
    assert "Range" in page.asked[-1]


def _no_space(path: Path) -> None:
    raise OSError(28, os.strerror(28))


def test_two_files_of_one_name_are_refused(server, download):
    files = [{"url": f"{server.url}/{folder}/a.fa"} for folder in "xy"]
    check_refused(download(files=files), "x/a.fa and .*y/a.fa would both be stored as a.fa")


def test_a_file_that_came_from_elsewhere_is_not_overwritten(server, download):
    server.add("a", BODY)
    Path("out").mkdir()
    Path("out/a").write_bytes(OTHER)
    check_refused(download(files=[{"url": f"{server.url}/a"}]), "a exists and was not downloaded")
    assert Path("out/a").read_bytes() == OTHER


@pytest.mark.parametrize("known", [{}, {"md5": md5(BODY)}])
def test_a_folder_in_the_way_is_not_touched(server, download, known):
    server.add("a", BODY)
    Path("out/a").mkdir(parents=True)
    check_refused(download(files=[{"url": f"{server.url}/a", **known}]), "out/a exists and was not")


def test_an_output_that_is_a_file_is_refused(server, download):
    server.add("a", BODY)
    Path("out").write_text("a file")
    check_refused(download(files=[{"url": f"{server.url}/a"}]), "out cannot be created: .*--out")


def test_a_file_of_another_address_is_not_overwritten(server, download):
    server.add("x/a", BODY)
    server.add("y/a", OTHER)
    download(files=[{"url": f"{server.url}/x/a"}])
    check_refused(download(files=[{"url": f"{server.url}/y/a"}]), "a was downloaded from .*x/a and")
    assert Path("out/a").read_bytes() == BODY


def test_a_file_put_there_by_hand_is_taken_over_if_its_checksum_is_right(server, download):
    server.add("a", BODY)
    Path("out").mkdir()
    Path("out/a").write_bytes(BODY)
    assert download(files=[{"url": f"{server.url}/a", "md5": md5(BODY)}])[0] == 0
    assert not server.gets
    record = json.loads(Path("out/downloads.json").read_text())["files"]
    assert record["a"]["bytes"] == len(BODY)


def test_a_killed_process_is_gone_on_with(server, download):
    body = BODY * 8
    page = server.add("a", body, pace=0.02)
    files = [{"url": f"{server.url}/a", "md5": md5(body)}]
    download("--dry-run", files=files)  # writes the list
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE)
    partial = Path("out/a.partial")
    deadline = time.monotonic() + 60
    while not partial.exists() or partial.stat().st_size < 1_000_000:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert left() == ["a.partial", "a.partial.json"]
    assert partial.stat().st_size < len(body)
    page.pace = 0
    assert download(files=files)[0] == 0
    assert Path("out/a").read_bytes() == body
    assert int(re.match(r"bytes=(\d+)-", page.asked[-1]["Range"])[1]) >= 1_000_000


def test_a_second_download_into_one_folder_is_refused(server, download):
    server.add("a", BODY * 8, pace=0.2)
    files = [{"url": f"{server.url}/a"}]
    download("--dry-run", files=files)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(COMMAND, env=environment, stdout=subprocess.PIPE)
    try:
        while not Path("out/a.partial").exists():
            assert process.poll() is None
            time.sleep(0.01)
        check_refused(download(files=files), "another download is writing to out; wait")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
    finally:
        process.kill()
        process.communicate()
    assert "a" not in left() and "a.partial" in left()
