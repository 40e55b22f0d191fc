"""Downloads resume, are verified, and fail with a line that says what to put where."""

import hashlib
import http.server
import io
import threading
import zipfile

import pytest

from coco_download import Archive, download
from utils import UserError


@pytest.fixture
def server():
    """(address, {path: bytes}, list of Range headers) of a file server that honours ranges."""
    files, ranges = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            data = files.get(self.path)
            wanted = self.headers.get("Range")
            ranges.append(wanted)
            if data is None:
                self.send_error(404)
                return
            start = int(wanted[len("bytes=") : -1]) if wanted else 0
            if start >= len(data):
                self.send_error(416)
                return
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start:])

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", files, ranges
        running.shutdown()


def archive_of(server, name, contents):
    address, files, _ = server
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
    files[f"/{name}"] = data.getvalue()
    return f"{address}/{name}", hashlib.sha1(data.getvalue()).hexdigest()


def test_download_unpacks_what_is_verified_and_keeps_what_is_there(tmp_path, server, capsys):
    archives = (
        Archive(
            *archive_of(server, "ann.zip", {"annotations/a.json": "{}", "annotations/b.json": "[]"}),
            ("annotations/a.json",),
        ),
        Archive(
            *archive_of(server, "val.zip", {"val2017/1.jpg": "one", "val2017/2.jpg": "two"}), ("val2017",)
        ),
    )
    folder = tmp_path / "coco"
    download(folder, archives)
    assert (folder / "annotations/a.json").read_text() == "{}" and (
        folder / "annotations/b.json"
    ).read_text() == "[]"
    assert (folder / "val2017/2.jpg").read_text() == "two"
    assert sorted(path.name for path in folder.iterdir()) == ["annotations", "val2017"]
    requests = len(server[2])
    download(folder, archives)
    assert len(server[2]) == requests and "has val2017" in capsys.readouterr().out


def test_a_cut_off_transfer_goes_on(tmp_path, server):
    archive = Archive(*archive_of(server, "val.zip", {"val2017/1.jpg": "one" * 100}), ("val2017",))
    whole = server[1]["/val.zip"]
    (tmp_path / "val.zip.part").write_bytes(whole[:40])
    download(tmp_path, (archive,))
    assert server[2] == ["bytes=40-"]
    assert (tmp_path / "val2017/1.jpg").read_text() == "one" * 100


def test_a_part_that_is_whole_already(tmp_path, server):
    archive = Archive(*archive_of(server, "val.zip", {"val2017/1.jpg": "one"}), ("val2017",))
    (tmp_path / "val.zip.part").write_bytes(server[1]["/val.zip"])
    download(tmp_path, (archive,))
    assert (tmp_path / "val2017/1.jpg").read_text() == "one"


def test_an_archive_put_there_by_hand_is_taken(tmp_path, server):
    archive = Archive(*archive_of(server, "val.zip", {"val2017/1.jpg": "one"}), ("val2017",))
    (tmp_path / "val.zip").write_bytes(server[1].pop("/val.zip"))
    download(tmp_path, (archive,))
    assert server[2] == [] and (tmp_path / "val2017/1.jpg").exists()


def test_a_wrong_hash_removes_the_file(tmp_path, server):
    url, _ = archive_of(server, "val.zip", {"val2017/1.jpg": "one"})
    with pytest.raises(UserError, match=r"val.zip: has SHA-1 .*, not 0000; it is removed"):
        download(tmp_path, (Archive(url, "0000", ("val2017",)),))
    assert list(tmp_path.iterdir()) == []


def test_an_archive_cannot_write_outside(tmp_path, server):
    archive = Archive(
        *archive_of(server, "val.zip", {"../../evil": "x", "val2017/1.jpg": "one"}), ("val2017",)
    )
    folder = tmp_path / "a" / "b"
    download(folder, (archive,))
    assert not (tmp_path / "evil").exists() and not (tmp_path / "a" / "evil").exists()


def test_offline_says_what_to_put_where(tmp_path, server):
    address = server[0]
    for url in (f"{address}/none.zip", "http://127.0.0.1:9/none.zip"):
        with pytest.raises(UserError, match=rf"none.zip: .*put none.zip in {tmp_path} and run again"):
            download(tmp_path, (Archive(url, "", ("x",)),))
