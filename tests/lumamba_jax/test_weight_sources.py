"""Paths, names and hub addresses become checked local files; the hub is a stand-in on loopback, never the network."""

import ast
import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from lumamba_jax import checkpoint, weight_sources
from lumamba_jax.weight_sources import ALIASES, LICENCE, file_sha256, resolve

REPO = "PulpBio/LuMamba"
FILE = "LuMamba_LeJEPA_reconstruction_300slices.safetensors"
ADDRESS = f"hf://{REPO}/{FILE}"
OLD, NEW = "a" * 40, "b" * 40
WEIGHTS = {OLD: b"old weights" * 1000, NEW: b"new weights" * 1000}
SHARDS = {f"part-{k}-of-2.safetensors": bytes([k]) * 5000 for k in (1, 2)}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubStandIn:
    """The endpoints of the hub that huggingface_hub uses, with the status codes and headers of the real one."""

    def __init__(self):
        index = json.dumps({"weight_map": {"a": "part-1-of-2.safetensors", "b": "part-2-of-2.safetensors"}}).encode()
        self.branches = {"main": NEW, "v1": OLD}
        self.repos = {
            REPO: {commit: {FILE: content, "README.md": b"card"} for commit, content in WEIGHTS.items()},
            "PulpBio/FEMBA": {NEW: {"TUAB/FEMBA_base.safetensors": b"base", "TUAB/FEMBA_large.safetensors": b"large"}},
            "me/sharded": {
                NEW: {"big/model.safetensors.index.json": index} | {f"big/{k}": v for k, v in SHARDS.items()}
            },
            "me/export": {NEW: {"m/metadata.json": b"{}", "m/weights/0/data": b"numbers", "m/weights/zarr": b"z"}},
        }
        self.token: str | None = None  # when set, the only one that is let in
        self.gated = False
        self.truncate: list[int] = []  # bytes after which the next downloads break off
        self.lie_about_length = False  # a proxy that cuts the body and says that this was all
        self.status: int | None = None  # answers everything
        self.page: bytes | None = None  # answers everything
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self):
        if self.thread.is_alive():
            self.server.shutdown()
            self.thread.join()
            self.server.server_close()

    def commit(self, repo: str, revision: str) -> str | None:
        commit = self.branches.get(revision, revision)
        return commit if commit in self.repos[repo] else None


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.page is not None:
            return self.answer(200, self.hub.page)
        if self.hub.status is not None:
            return self.answer(self.hub.status)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        repo = "/".join(parts[2:4] if api else parts[:2])
        authorization = self.headers.get("Authorization")
        if self.hub.token and authorization != f"Bearer {self.hub.token}":
            message = (
                "Invalid credentials in Authorization header" if authorization else "Invalid username or password."
            )
            return self.answer(401, **{"X-Error-Message": message})
        if repo not in self.hub.repos:
            return self.answer(401, **{"X-Error-Code": "RepoNotFound"})
        commit = self.hub.commit(repo, parts[5] if api else parts[3])
        if commit is None:
            return self.answer(404, **{"X-Error-Code": "RevisionNotFound"})
        files = self.hub.repos[repo][commit]
        if api:
            return self.answer(200, json.dumps(self.describe(repo, commit, files)).encode())
        if self.hub.gated:
            return self.answer(403, **{"X-Error-Code": "GatedRepo"})
        return self.send_file(commit, "/".join(parts[4:]), files)

    def describe(self, repo: str, commit: str, files: dict[str, bytes]) -> dict:
        def sibling(name: str, content: bytes) -> dict:
            lfs = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            entry = {"rfilename": name, "size": len(content), "blobId": git_blob_id(content)}
            return entry | ({} if name.endswith((".json", ".md")) else {"lfs": lfs})

        return {"id": repo, "sha": commit, "siblings": [sibling(name, content) for name, content in files.items()]}

    def send_file(self, commit: str, name: str, files: dict[str, bytes]):
        if name not in files:
            return self.answer(404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_blob_id(content)}"'}
        if not name.endswith((".json", ".md")):
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        stop = self.hub.truncate.pop(0) if self.hub.truncate and self.command == "GET" else len(content)
        length = (stop if self.hub.lie_about_length and self.command == "GET" else len(content)) - start
        return self.answer(206 if start else 200, content[start:stop], length, **headers)

    def answer(self, status: int, body: bytes = b"", length: int | None = None, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub.constants", reason="the extra `hub` is not installed")
    standin = HubStandIn()
    monkeypatch.setattr(constants, "ENDPOINT", standin.url)
    template = standin.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    yield standin
    standin.stop()


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def assert_one_sentence(error: pytest.ExceptionInfo):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600


# --- paths on disk ---------------------------------------------------------------------------------------------------


def test_a_file_on_disk_needs_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"weights")
    found = resolve(str(path), sha256=sha256(b"weights").upper())
    assert found.path == path
    assert found.provenance["sha256"] == sha256(b"weights")
    assert found.provenance["verified"] == ["given"]
    assert found.provenance["licence"] is None
    assert "Unknown origin" in found.provenance["licence_note"]
    json.dumps(found.provenance)


def test_a_folder_on_disk_is_returned_as_it_is(tmp_path):
    found = resolve(tmp_path)
    assert (found.path, found.provenance["sha256"], found.provenance["verified"]) == (tmp_path, None, [])
    with pytest.raises(ValueError, match="one file"):
        resolve(tmp_path, sha256="0" * 64)


def test_a_wrong_checksum_of_a_local_file_is_refused(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"weights")
    with pytest.raises(ValueError, match="delete it and download it again") as error:
        resolve(path, sha256=sha256(b"others"))
    assert_one_sentence(error)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        resolve(path, sha256="abc")


def test_a_local_copy_of_a_published_file_is_recognised_by_its_bytes(tmp_path, monkeypatch):
    path = tmp_path / "renamed.safetensors"
    path.write_bytes(b"weights")
    published = weight_sources.PublishedCheckpoint("PulpBio/LUNA", "x.safetensors", "LUNA", sha256(b"weights"))
    monkeypatch.setattr(weight_sources, "ALIASES", {"x": published})
    assert resolve(path).provenance["licence"] == LICENCE
    assert "2510.22257" in resolve(path).provenance["licence_note"]


def test_what_exists_on_disk_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "luna-base").write_bytes(b"mine")
    assert resolve("luna-base").path == Path("luna-base")


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lumamba-tiny-mixd", "LuMamba_Tiny", "missing/lumamba-tiny-mixed"])
def test_an_unknown_name_gets_the_closest_ones(name):
    with pytest.raises(FileNotFoundError, match="lumamba-tiny-mixed") as error:
        resolve(name)
    assert_one_sentence(error)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 5000, Path("luna-base")])
def test_no_path_and_no_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name == "":  # the folder we are in
        assert resolve(name).path == Path()
        return
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        resolve(name)


def test_every_alias_is_a_published_file_with_a_licence():
    for name, published in ALIASES.items():
        assert name == name.casefold()
        assert "_" not in name
        assert published.repo.casefold() in weight_sources.PUBLICATIONS
        assert published.file.endswith(".safetensors")
        assert published.sha256 is None or len(published.sha256) == 64
    assert len({published.address for published in ALIASES.values()}) == len(ALIASES)


def test_an_alias_in_any_case_is_its_file(hub):
    with pytest.warns(UserWarning, match="another file than the one first published"):
        found = resolve("LuMamba_Tiny-MIXED")
    assert found.path.read_bytes() == WEIGHTS[NEW]
    assert found.provenance["alias"] == "lumamba-tiny-mixed"
    assert found.provenance["file"] == FILE
    with pytest.warns(UserWarning, match="another file"):
        assert resolve("lumamba-tiny-mixed@v1").path.read_bytes() == WEIGHTS[OLD]


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_download_with_provenance(hub):
    found = resolve(ADDRESS, sha256=sha256(WEIGHTS[NEW]))
    assert found.path.name == FILE
    assert found.path.read_bytes() == WEIGHTS[NEW]
    assert found.provenance == {
        "source": ADDRESS,
        "alias": None,
        "repo": REPO,
        "requested_revision": "main",
        "revision": NEW,
        "file": FILE,
        "sha256": sha256(WEIGHTS[NEW]),
        "files": {FILE: sha256(WEIGHTS[NEW])},
        "verified": ["hub", "given"],
        "retrieved": "hub",
        "licence": LICENCE,
        "licence_note": weight_sources.LUMAMBA.licence_note,
    }
    assert "2603.19100" in found.provenance["licence_note"]


def test_weights_of_others_have_no_licence_claim(hub):
    provenance = resolve("hf://me/export/m").provenance
    assert provenance["licence"] is None
    assert "if these are the published weights" in provenance["licence_note"]


def test_a_second_load_without_network_uses_the_cache_and_says_so(hub):
    first = resolve(ADDRESS)
    hub.stop()
    with pytest.warns(UserWarning, match="out of reach.*cached copy of commit bbbbbbbbbbbb"):
        second = resolve(ADDRESS)
    assert second.path == first.path
    assert second.provenance["retrieved"] == "cache"
    assert second.provenance["revision"] == NEW
    assert second.provenance["verified"] == ["hub"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_in_trouble_is_like_no_network(hub, status):
    hub.status = status
    with pytest.raises(ConnectionError, match=f"status {status}, and nothing of it is in the cache") as error:
        resolve(ADDRESS)
    assert_one_sentence(error)
    hub.status = None
    path = resolve(ADDRESS).path
    hub.status, asked = status, len(hub.requests)
    with pytest.warns(UserWarning, match=f"status {status}; using the cached copy"):
        assert resolve(ADDRESS).path == path
    assert len(hub.requests) == asked + 1  # asked once, then left alone


def test_a_login_page_instead_of_the_hub(hub):
    hub.page = b"<html>Welcome to the hotel</html>"
    with pytest.raises(ConnectionError, match="not the hub"):
        resolve(ADDRESS)


def test_no_network_and_nothing_cached(hub):
    hub.stop()
    with pytest.raises(ConnectionError, match=r"out of reach.*nothing of it is in the cache") as error:
        resolve(ADDRESS)
    assert_one_sentence(error)


def test_offline_variable(hub, offline):
    offline()
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set, and nothing of it") as error:
        resolve(ADDRESS)
    assert_one_sentence(error)
    assert hub.requests == []


def test_offline_with_the_file_cached_asks_nobody_and_does_not_warn(hub, offline):
    resolve(ADDRESS)
    offline()
    asked = len(hub.requests)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resolve(ADDRESS)
    assert found.path.read_bytes() == WEIGHTS[NEW]
    assert found.provenance["retrieved"] == "cache"
    assert len(hub.requests) == asked
    with pytest.raises(ConnectionError, match=r"the cache has no other.safetensors of commit bbbb"):
        resolve(f"hf://{REPO}/other.safetensors")


def test_environment_variables_of_the_hub_are_honoured(hub, tmp_path):
    """In a fresh process: HF_ENDPOINT and HF_HOME for a download, HF_HUB_OFFLINE for what it left."""
    code = (
        f"from lumamba_jax.weight_sources import resolve; found = resolve({ADDRESS!r}); "
        "print(found.path, found.provenance['retrieved'])"
    )
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "other"), "JAX_PLATFORMS": "cpu"}
    run = {"capture_output": True, "text": True, "check": True}
    online = subprocess.run([sys.executable, "-c", code], env=environment, **run).stdout.split()
    assert Path(online[0]).is_relative_to(tmp_path / "other")
    assert online[1] == "hub"
    hub.stop()
    offline = subprocess.run([sys.executable, "-c", code], env=environment | {"HF_HUB_OFFLINE": "1"}, **run)
    assert offline.stdout.split() == [online[0], "cache"]


def test_pinned_revisions(hub):
    assert resolve(f"hf://{REPO}@v1/{FILE}").path.read_bytes() == WEIGHTS[OLD]
    pinned = resolve(f"hf://{REPO}@{OLD}/{FILE}")
    assert pinned.provenance["revision"] == OLD
    assert pinned.path.read_bytes() == WEIGHTS[OLD]
    asked = len(hub.requests)
    assert resolve(f"hf://{REPO}@{OLD}/{FILE}").provenance["retrieved"] == "cache"
    assert len(hub.requests) == asked
    hub.stop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a commit never changes, so there is nothing to warn of
        assert resolve(f"hf://{REPO}@{OLD}/{FILE}").path == pinned.path


def test_a_moved_branch_is_followed(hub):
    hub.branches["main"] = OLD
    first = resolve(ADDRESS)
    hub.branches["main"] = NEW
    second = resolve(ADDRESS)
    assert (first.provenance["revision"], second.provenance["revision"]) == (OLD, NEW)
    assert second.path.read_bytes() == WEIGHTS[NEW]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (f"hf://{REPO}@v2/{FILE}", "has no revision v2"),
        (f"hf://{REPO}@{'c' * 40}/{FILE}", "has no revision cccc"),
        (f"hf://{REPO}/LuMamba_LeJEPA_reconstruction.safetensors", f"closest: {FILE}"),
        (f"hf://PulpBio/LuMamb/{FILE}", "no repository PulpBio/LuMamb.*published: PulpBio/LuMamba"),
        ("hf://PulpBio/FEMBA/FEMBA_base.safetensors", "closest: TUAB/FEMBA_base.safetensors"),
    ],
)
def test_wrong_names_get_one_sentence(hub, address, message):
    with pytest.raises(FileNotFoundError, match=message) as error:
        resolve(address)
    assert_one_sentence(error)


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://owner",
        f"hf://{REPO}/../{FILE}",
        f"hf://{REPO}@../{FILE}",
        f"hf://{REPO}@%2e%2e%2fx/{FILE}",
        f"hf://{REPO}//{FILE}",
        "hf://a b/c/d",
        f"hf://{REPO}/a\\b",
    ],
)
def test_malformed_addresses(address):
    with pytest.raises(ValueError, match="not an address on the hub"):
        resolve(address)


def test_a_revision_with_a_slash_is_written_with_an_escape(hub):
    hub.branches["refs/pr/1"] = OLD
    assert resolve(f"hf://{REPO}@refs%2Fpr%2F1/{FILE}").path.read_bytes() == WEIGHTS[OLD]


def test_tokens(hub, monkeypatch):
    hub.token = "good"
    with pytest.raises(FileNotFoundError, match="private and needs a token") as error:
        resolve(ADDRESS)
    assert_one_sentence(error)
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(PermissionError, match="refused the access token") as error:
        resolve(ADDRESS)
    assert_one_sentence(error)
    assert "bad" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", "good")
    assert resolve(ADDRESS).path.read_bytes() == WEIGHTS[NEW]


def test_gated_and_forbidden(hub):
    hub.gated = True
    with pytest.raises(PermissionError, match="granted on request") as error:
        resolve(ADDRESS)
    assert_one_sentence(error)
    hub.status = 403
    with pytest.raises(PermissionError, match="refused the access token"):
        resolve(ADDRESS)


# --- integrity -------------------------------------------------------------------------------------------------------


def test_a_truncated_body_is_an_error_and_no_file(hub, tmp_path):
    hub.truncate, hub.lie_about_length = [700], True
    with pytest.raises(ConnectionError, match=r"broke off.*run it again \(.*700") as error:
        resolve(ADDRESS)
    assert_one_sentence(error)
    assert [path for path in (tmp_path / "home").rglob(FILE) if path.is_file()] == []
    hub.lie_about_length = False
    assert resolve(ADDRESS).path.read_bytes() == WEIGHTS[NEW]


def test_an_interrupted_download_goes_on_where_it_stopped(hub):
    hub.truncate = [700]
    try:
        found = resolve(ADDRESS)  # newer versions of huggingface_hub resume by themselves, older ones on the next call
    except ConnectionError:
        found = resolve(ADDRESS)
    assert found.path.read_bytes() == WEIGHTS[NEW]
    assert len([line for line in hub.requests if line.startswith("GET /Pulp")]) == 2


@pytest.mark.parametrize("online", [True, False])
def test_a_damaged_file_in_the_cache_is_found_and_can_be_replaced(hub, monkeypatch, online):
    blob = resolve(ADDRESS).path.resolve()
    content = bytearray(blob.read_bytes())
    content[100] ^= 1
    blob.write_bytes(content)
    with monkeypatch.context() as context:
        if not online:
            context.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"damaged.*delete it and download it again") as error:
            resolve(ADDRESS)
    assert_one_sentence(error)
    assert str(blob) in str(error.value)
    blob.unlink()
    assert resolve(ADDRESS).path.read_bytes() == WEIGHTS[NEW]


def test_a_damaged_text_file_is_found_by_its_git_id(hub):
    blob = resolve(f"hf://{REPO}/README.md").path.resolve()
    assert blob.name == git_blob_id(b"card")
    blob.write_bytes(b"cars")
    with pytest.raises(ValueError, match="damaged"):
        resolve(f"hf://{REPO}/README.md")


def test_where_links_are_impossible_the_listed_digest_counts(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    found = resolve(ADDRESS)
    assert not found.path.is_symlink()
    assert found.provenance["verified"] == ["hub"]
    found.path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="damaged"):
        resolve(ADDRESS)


def test_another_checksum_than_the_given_one(hub):
    with pytest.raises(ValueError, match="not the given"):
        resolve(ADDRESS, sha256=sha256(WEIGHTS[OLD]))


# --- folders and shards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["big", "big/", "big/model.safetensors.index.json"])
def test_an_index_brings_its_shards(hub, path):
    found = resolve(f"hf://me/sharded/{path}")
    assert found.path.name == "model.safetensors.index.json"
    for name, content in SHARDS.items():
        assert (found.path.parent / name).read_bytes() == content
        assert found.provenance["files"][f"big/{name}"] == sha256(content)
        # by commit, not by branch: a branch may move between two files
        assert f"GET /me/sharded/resolve/{NEW}/big/{name}" in hub.requests
    hub.stop()
    with pytest.warns(UserWarning, match="cached copy"):
        assert resolve(f"hf://me/sharded/{path}").path == found.path


def test_a_damaged_shard_is_found(hub):
    found = resolve("hf://me/sharded/big")
    (found.path.parent / "part-2-of-2.safetensors").resolve().write_bytes(b"x")
    with pytest.raises(ValueError, match="damaged"):
        resolve("hf://me/sharded/big")


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": ["part-1-of-2.safetensors"]}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": ["x"]}}',
        b'{"weight_map": {"a": "../../secret.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}',
        b'{"weight_map": {"a": "sub/part.safetensors"}}',
        b'{"weight_map": {"a": "..\\\\part.safetensors"}}',
        b'{"weight_map": {"a": ".."}}',
        b'{"weight_map": {"a": ""}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
    ids=range(15),
)
def test_a_hostile_index_fetches_nothing(hub, index):
    hub.repos["me/sharded"][NEW]["big/model.safetensors.index.json"] = index
    with pytest.raises(ValueError, match="index") as error:
        resolve("hf://me/sharded/big")
    assert_one_sentence(error)
    assert not [line for line in hub.requests if "part" in line or "passwd" in line or "secret" in line]


def test_an_index_with_a_shard_that_is_not_there(hub):
    del hub.repos["me/sharded"][NEW]["big/part-2-of-2.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"has no big/part-2-of-2\.safetensors"):
        resolve("hf://me/sharded/big")


def test_one_of_our_exports_is_fetched_whole(hub, offline):
    found = resolve("hf://me/export/m")
    assert (found.path / checkpoint.METADATA_FILE).read_bytes() == b"{}"
    assert (found.path / "weights" / "0" / "data").read_bytes() == b"numbers"
    assert (found.path / "weights" / "zarr").read_bytes() == b"z"
    assert f"GET /me/export/resolve/{NEW}/m/weights/zarr" in hub.requests
    assert found.provenance["sha256"] is None
    assert len(found.provenance["files"]) == 3
    offline()
    assert resolve("hf://me/export/m").path == found.path
    with pytest.raises(ValueError, match="one file"):
        resolve("hf://me/export/m", sha256="0" * 64)


def test_a_folder_of_several_models_is_ambiguous(hub):
    with pytest.raises(
        ValueError, match=r"2 files of weights; name one file: TUAB/FEMBA_base.safetensors, TUAB/FEMBA_l"
    ):
        resolve("hf://PulpBio/FEMBA/TUAB")
    assert resolve(f"hf://{REPO}").path.name == FILE  # the only weights of this repository
    with pytest.raises(ValueError, match="no files of weights"):
        resolve("hf://me/export/m/weights")


# --- the package -----------------------------------------------------------------------------------------------------


def test_without_the_package_the_hub_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for source in (ADDRESS, "luna-base"):
        with pytest.raises(ImportError, match=r'pip install "lumamba_jax\[hub\]"') as error:
            resolve(source)
        assert_one_sentence(error)


def test_importing_the_module_does_not_import_the_hub():
    tree = ast.parse(Path(weight_sources.__file__).read_text())
    top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in top} & {"huggingface_hub", "jax", "lumamba_jax"}
    assert weight_sources.EXPORT_METADATA == checkpoint.METADATA_FILE


def test_file_sha256(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert file_sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
