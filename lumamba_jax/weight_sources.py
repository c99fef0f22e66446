"""Where weights come from: a path on disk, an address on the Hugging Face hub, or the name of a published checkpoint.

`resolve` turns any of them into something local together with its provenance: the exact commit, the SHA-256 and what
the licence allows. Paths on disk need no further package; the hub goes through `huggingface_hub` (the extra `hub`),
its cache and its environment variables (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN). Nothing is ever unpickled or
executed here, and no file is returned whose content differs from what the hub lists under that name.
"""

import contextlib
import difflib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple
from urllib.parse import unquote

HUB_SCHEME = "hf://"
DEFAULT_REVISION = "main"
INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
# What makes a folder one of our exports; spelt out because importing `checkpoint` would bring Orbax along.
EXPORT_METADATA = "metadata.json"
MAX_INDEX_BYTES = 32 * 2**20
MAX_SUGGESTIONS = 3
HUB_TIMEOUT_SECONDS = 10.0
LICENCE = "CC BY-ND 4.0"

_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOT_THE_HUB = (json.JSONDecodeError, KeyError, TypeError)  # from reading an answer that is no model's description


@dataclass(frozen=True)
class Publication:
    """Who is to be named when published weights are used."""

    family: str
    authors: str
    arxiv: str

    @property
    def licence_note(self) -> str:
        """One sentence: the attribution, and what the licence forbids."""
        return (
            f"Published {self.family} weights by {self.authors} (arXiv {self.arxiv}), {LICENCE}: name the authors, and "
            "do not share adapted weights."
        )


LUMAMBA = Publication("LuMamba", "Broustail, Tegon, Ingolfsson, Li and Benini", "2603.19100")
LUNA = Publication("LUNA", "Döner, Ingolfsson, Benini and Li", "2510.22257")
FEMBA = Publication("FEMBA", "Tegon, Ingolfsson, Wang, Benini and Li", "2502.06438")
PUBLICATIONS: Mapping[str, Publication] = MappingProxyType(
    {
        "pulpbio/lumamba": LUMAMBA,
        "pulpbio/luna": LUNA,
        "pulpbio/femba": FEMBA,
        "thorir/luna": LUNA,  # former names of the same repositories
        "thorir/femba": FEMBA,
    }
)
"""Repositories of published weights, in lower case."""
UNKNOWN_LICENCE_NOTE = (
    f"Unknown origin; if these are the published weights: {LICENCE}, name the authors (arXiv "
    f"{LUMAMBA.arxiv} LuMamba, {LUNA.arxiv} LUNA, {FEMBA.arxiv} FEMBA), and do not share adapted weights."
)


@dataclass(frozen=True)
class PublishedCheckpoint:
    """One published file.

    Attributes:
        repo: `owner/name` on the hub.
        file: path inside the repository.
        architecture: family and size. Every size follows from the tensors' names and shapes with the reader's
            defaults, so no override goes with it.
        sha256: of the file as first published, where known; None otherwise.
    """

    repo: str
    file: str
    architecture: str
    sha256: str | None = None

    @property
    def address(self) -> str:
        """`hf://owner/name/file`."""
        return f"{HUB_SCHEME}{self.repo}/{self.file}"


def _lumamba(stem: str, sha256: str) -> PublishedCheckpoint:
    return PublishedCheckpoint("PulpBio/LuMamba", f"LuMamba_{stem}.safetensors", "LuMamba tiny", sha256)


def _luna(size: str) -> PublishedCheckpoint:
    return PublishedCheckpoint("PulpBio/LUNA", f"LUNA_{size}.safetensors", f"LUNA {size}")


def _femba(size: str, corpus: str, sha256: str | None = None) -> PublishedCheckpoint:
    return PublishedCheckpoint("PulpBio/FEMBA", f"{corpus}/FEMBA_{size}.safetensors", f"FEMBA {size}", sha256)


ALIASES: Mapping[str, PublishedCheckpoint] = MappingProxyType(
    {
        "lumamba-tiny-mixed": _lumamba(
            "LeJEPA_reconstruction_300slices", "352451401ca7dd31dbdef853be2aff993fdb68d4e365fe116a9512ad0fd04c44"
        ),
        "lumamba-tiny-mixed-128slices": _lumamba(
            "LeJEPA_reconstruction_128slices", "72b97c9b9cb1ff67b8fafbdd183d5f4016285fd4cd97bdb467defd8d404b89fa"
        ),
        "lumamba-tiny-reconstruction": _lumamba(
            "ReconstructionOnly", "f4db415bb7bfecb9625f25ad156372d3f1ceaf6a1fbbb97d0fe5bdab14cfd4d6"
        ),
        "lumamba-tiny-lejepa": _lumamba(
            "LeJEPAOnly_128slices", "6256aaa8bbaa61f352304e0ae6bfc9e696956006aec9270e5a5e1286f48f3027"
        ),
        "luna-base": _luna("base"),
        "luna-large": _luna("large"),
        "luna-huge": _luna("huge"),
        "femba-base-tuab": _femba("base", "TUAB", "f9c670bd200080cae3d417dc49baa0f1347bfa728d2236fd8a97ab0d40772733"),
        "femba-large-tuab": _femba("large", "TUAB", "c3b4ebb02f574aeb8fb3c0e36b1d46167f1d300f8e3d8cdf519003a3f44fc04b"),
        "femba-tiny-tuar": _femba("tiny", "TUAR"),
        "femba-base-tuar": _femba("base", "TUAR", "3a35b63ab5fcdb2ad33aaec3f6cd2b86302e1274657163f18802db6114d055a2"),
        "femba-large-tuar": _femba("large", "TUAR", "66f4996b3274691dba060ced5e0427a11789b6c38d946bdac549ab65c8886cff"),
        "femba-tiny-tusl": _femba("tiny", "TUSL"),
        "femba-base-tusl": _femba("base", "TUSL"),
        "femba-large-tusl": _femba("large", "TUSL"),
    }
)
"""Names of the published checkpoints, in lower case."""


@dataclass(frozen=True)
class WeightSource:
    """What `resolve` found; everything is on this machine now.

    Attributes:
        path: a file (for sharded weights the index, with its shards beside it) or the folder of one of our exports.
        provenance: what JSON can hold: `source` as given, `alias`, `file`, `sha256` (None for a folder), `verified`
            (what the checksum was compared with: "hub", "given"), `licence` (None = unknown) and `licence_note`. From
            the hub also `repo`, `requested_revision`, `revision` (the commit), `retrieved` ("hub", or "cache" when the
            hub was not asked) and `files` (name -> SHA-256 of everything fetched).
    """

    path: Path
    provenance: dict[str, Any]


def resolve(source: str | Path, *, sha256: str | None = None) -> WeightSource:
    """Find weights, download what is not here yet, and check their integrity.

    Args:
        source: a path on disk, `hf://owner/repo[@revision]/file-or-folder`, or a name from `ALIASES` in any case,
            `name[@revision]`. What exists on disk goes first. A folder on the hub stands for the one set of weights
            in it: an export of ours, an index with its shards, or a single file.
        sha256: the checksum the named file must have (64 hexadecimal digits).

    Raises:
        FileNotFoundError: no such path, name, repository, revision or file; the closest ones are named.
        ValueError: a malformed address, checksum or shard index, a checksum that differs, or a folder that does not
            stand for one set of weights.
        ImportError: the hub is needed and `huggingface_hub` is not installed.
        PermissionError: the hub wants another token.
        ConnectionError: the hub is out of reach and the file is not cached, or the download broke off.
    """
    if sha256 is not None and not _SHA256.fullmatch(sha256 := sha256.lower()):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, not {sha256!r}")
    if str(source).startswith(HUB_SCHEME):
        return _resolve_hub(_Address.parse(str(source)), source=str(source), sha256=sha256)
    path = Path(source).expanduser()
    if os.path.exists(path):  # noqa: PTH110  (`Path.exists` raises for what cannot be a path)
        return _resolve_local(path, source=str(source), sha256=sha256)
    name, _, revision = str(source).partition("@")
    alias = name.casefold().replace("_", "-")
    if isinstance(source, str) and alias in ALIASES:
        published = ALIASES[alias]
        address = _Address.parse(f"{HUB_SCHEME}{published.repo}@{revision or DEFAULT_REVISION}/{published.file}")
        return _resolve_hub(address, source=source, sha256=sha256, alias=alias)
    raise FileNotFoundError(
        f"{source}: no such file or folder, and no known name (closest: {_closest(alias, ALIASES)}); "
        f"an address on the hub starts with {HUB_SCHEME}"
    )


def _resolve_local(path: Path, *, source: str, sha256: str | None) -> WeightSource:
    digest = None if path.is_dir() else file_sha256(path)
    if sha256 is not None:
        _require_given_sha256(path, digest, sha256)
    provenance = {
        "source": source,
        "alias": None,
        "file": path.name,
        "sha256": digest,
        "verified": [] if sha256 is None else ["given"],
        "licence": None,
        "licence_note": UNKNOWN_LICENCE_NOTE,
    }
    published = next((c for c in ALIASES.values() if c.sha256 is not None and c.sha256 == digest), None)
    if published is not None:  # equal bytes: the origin is not unknown after all
        provenance |= {"licence": LICENCE, "licence_note": PUBLICATIONS[published.repo.casefold()].licence_note}
    return WeightSource(path, provenance)


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_given_sha256(path: Path, digest: str | None, sha256: str) -> None:
    if digest is None:
        raise ValueError(f"{path}: sha256 is the checksum of one file and cannot be checked on a folder")
    if digest != sha256:
        raise ValueError(
            f"{path}: its SHA-256 is {digest}, not the given {sha256}; it is damaged or another file: delete it and "
            "download it again"
        )


def _closest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=MAX_SUGGESTIONS, cutoff=0.5)
    return ", ".join(close or known) or "none"


@dataclass(frozen=True)
class _Address:
    """A file or folder of a repository on the hub; the empty path is the whole repository."""

    repo: str
    revision: str
    path: str

    @classmethod
    def parse(cls, text: str) -> "_Address":
        match = _ADDRESS.fullmatch(text)
        path = (match["path"] or "").rstrip("/") if match else ""
        revision = unquote(match["revision"] or DEFAULT_REVISION) if match else ""
        if match is None or not (_is_plain(revision) and (not path or _is_plain(path))):
            raise ValueError(f"{text}: not an address on the hub, which reads hf://owner/repo[@revision]/file")
        return cls(match["repo"], revision, path)

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, whose content never changes."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        revision = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return f"{HUB_SCHEME}{self.repo}{revision}/{self.path}"


def _is_plain(name: str) -> bool:
    """Whether a relative name with forward slashes stays below its folder on every system."""
    return all(part not in ("", ".", "..") for part in name.split("/")) and not set(name) & set('\\:\0"<>|?*')


@dataclass(frozen=True)
class _Listing:
    """Files of a repository at one commit: name -> the digest the hub states (SHA-256, or a git blob id for small
    text files). `unreached` says why the hub was not asked or did not answer; None = this is its answer.
    """

    commit: str
    files: Mapping[str, str | None]
    unreached: str | None = None


def _resolve_hub(address: _Address, *, source: str, sha256: str | None, alias: str | None = None) -> WeightSource:
    _require_hub_package()
    listing = _list_files(address)
    names = _select(address, listing)
    if sha256 is not None and names != [address.path]:
        raise ValueError(f"{address}: sha256 is the checksum of one file and cannot be checked on a folder")
    if listing.unreached and not address.pinned and not _offline():
        warnings.warn(
            f"{address}: {listing.unreached}; using the cached copy of commit {listing.commit[:12]}", stacklevel=3
        )
    snapshot, checks = _fetch(address, names, address.revision, listing)
    if names[0].endswith(INDEX_SUFFIX):
        shards = _shard_names(snapshot / names[0], names[0])
        _require_listed(address, shards, listing)
        checks |= _fetch(address, shards, snapshot.name, listing)[1]
    single = len(names) == 1
    if sha256 is not None:
        _require_given_sha256(snapshot / names[0], checks[names[0]].sha256, sha256)
    if alias is not None and ALIASES[alias].sha256 not in (None, checks[names[0]].sha256):
        warnings.warn(f"{address}: the hub now holds another file than the one first published there", stacklevel=3)
    publication = PUBLICATIONS.get(address.repo.casefold())
    provenance = {
        "source": source,
        "alias": alias,
        "repo": address.repo,
        "requested_revision": address.revision,
        "revision": snapshot.name,
        "file": names[0] if single else address.path,
        "sha256": checks[names[0]].sha256 if single else None,
        "files": {name: check.sha256 for name, check in checks.items()},
        "verified": ["hub"] * all(check.by_hub for check in checks.values()) + ["given"] * (sha256 is not None),
        "retrieved": "cache" if listing.unreached else "hub",
        "licence": LICENCE if publication else None,
        "licence_note": publication.licence_note if publication else UNKNOWN_LICENCE_NOTE,
    }
    return WeightSource(snapshot / (names[0] if single else address.path), provenance)


def _require_hub_package() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'weights from the Hugging Face hub need the package huggingface_hub: pip install "lumamba_jax[hub]" '
            "(files on disk need nothing)"
        ) from error


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _list_files(address: _Address) -> _Listing:
    """The files at the address's revision: as the hub says, or as the cache has them when it cannot be asked."""
    from huggingface_hub import HfApi, constants

    cached = _cached_listing(address)
    if address.pinned and cached and address.path in cached.files and not address.path.endswith(INDEX_SUFFIX):
        return cached
    with _readable_errors(address):
        try:
            api = HfApi(endpoint=constants.ENDPOINT)
            info = api.model_info(
                address.repo, revision=address.revision, files_metadata=True, timeout=HUB_TIMEOUT_SECONDS
            )
            files = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or ()}
            return _Listing(str(info.sha), files)
        except (*_hub_failures(), *_NOT_THE_HUB) as error:
            reason = _unreached(error)
            if reason is None:
                raise
            if cached is not None:
                return _Listing(cached.commit, cached.files, reason)
            raise ConnectionError(
                f"{address}: {reason}, and nothing of it is in the cache ({constants.HF_HUB_CACHE}); "
                "get it once with a connection, or give a path on disk"
            ) from error


def _cached_listing(address: _Address) -> _Listing | None:
    """What huggingface_hub's cache holds: refs/REVISION names a commit, snapshots/COMMIT links to its files."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=address.repo, repo_type="model")
    reference = repository / "refs" / address.revision
    commit = reference.read_text().strip() if reference.is_file() else address.revision
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        return None
    files = (path for path in snapshot.rglob("*") if path.is_file())
    return _Listing(
        commit, {path.relative_to(snapshot).as_posix(): None for path in files}, "a pinned commit never changes"
    )


def _hub_failures() -> tuple[type[BaseException], ...]:
    """What huggingface_hub raises when a request, a download or its validation fails."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    # Its HTTP client's errors have one base, from which its own status errors derive; the client changes by version.
    return (HfHubHTTPError.__bases__[0], OSError, RuntimeError, EntryNotFoundError, HFValidationError)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _unreached(error: BaseException) -> str | None:
    """Why the hub could not be asked; None when it did answer."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    if _offline():
        return "HF_HUB_OFFLINE is set"
    status = _status(error)
    if status is not None:
        return f"the hub answered with status {status}" if status >= 500 or status == 429 else None
    if isinstance(error, EntryNotFoundError | HFValidationError):
        return None
    if isinstance(error, _NOT_THE_HUB):
        return "what answered is not the hub (a proxy or login page?)"
    return "the hub is out of reach (no network?)"


@contextlib.contextmanager
def _readable_errors(address: _Address) -> Iterator[None]:
    """One sentence and a built-in type for whatever huggingface_hub raises."""
    from huggingface_hub import errors, get_token

    repo = address.repo
    try:
        yield
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{address}: access to {repo} is granted on request; ask for it on the repository's page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _no_repository(address) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{address}: {repo} has no revision {address.revision}; give a branch, a tag or a commit of 40 digits, or "
            f"leave @{address.revision} away for {DEFAULT_REVISION}"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(f"{address}: not a possible repository name, which reads owner/name") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(f"{address}: the hub went out of reach before the download; run it again") from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{address}: the file has just gone from {repo}; look at what is there now") from error
    except _hub_failures() as error:
        if type(error) is ConnectionError:  # said in full already
            raise
        if _status(error) == 401 and get_token() is None:  # the hub does not tell a private repository from none
            raise _no_repository(address) from error
        if _status(error) in (401, 403):
            raise PermissionError(
                f"{address}: the hub refused the access token; log in again with `hf auth login`, set another "
                "HF_TOKEN, or unset it for public repositories"
            ) from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(
            f"{address}: the download broke off and its beginning is not used as weights; run it again ({reason[:200]})"
        ) from error


def _no_repository(address: _Address) -> FileNotFoundError:
    return FileNotFoundError(
        f"{address}: the hub has no repository {address.repo}, or it is private and needs a token (`hf auth login` or "
        f"HF_TOKEN); published: {_closest(address.repo, {c.repo for c in ALIASES.values()})}"
    )


def _select(address: _Address, listing: _Listing) -> list[str]:
    """The file the address names, or the one set of weights in the folder it names; the main file is first."""
    if address.path in listing.files:
        return [address.path]
    prefix = f"{address.path}/" if address.path else ""
    inside = {name.removeprefix(prefix) for name in listing.files if name.startswith(prefix) and _is_plain(name)}
    if not inside:
        _require_listed(address, [address.path], listing)
    if EXPORT_METADATA in inside:
        return [prefix + name for name in sorted(inside, key=lambda name: (name != EXPORT_METADATA, name))]
    indices = [name for name in inside if name.endswith(INDEX_SUFFIX) and "/" not in name]
    weights = indices or [name for name in inside if name.endswith(WEIGHT_SUFFIXES) and "/" not in name]
    if len(weights) == 1:
        return [prefix + weights[0]]
    offered = sorted(prefix + name for name in inside if name.endswith((INDEX_SUFFIX, *WEIGHT_SUFFIXES)))
    raise ValueError(
        f"{address} is a folder with {len(weights) or 'no'} files of weights; name one file: "
        f"{', '.join(offered) or 'there is none in it'}"
    )


def _require_listed(address: _Address, names: Iterable[str], listing: _Listing) -> None:
    missing = [name for name in names if name not in listing.files]
    if not missing:
        return
    if listing.unreached:
        raise ConnectionError(
            f"{address}: {listing.unreached}, and the cache has no {', '.join(missing)} of commit "
            f"{listing.commit[:12]}; get it once with a connection"
        )
    known = [name for name in listing.files if name.endswith((INDEX_SUFFIX, *WEIGHT_SUFFIXES))]
    raise FileNotFoundError(
        f"{address}: {address.repo} has no {', '.join(missing)} at {address.revision}; closest: "
        f"{_closest(missing[0], known)}"
    )


class _Check(NamedTuple):
    sha256: str
    by_hub: bool  # whether the hub's own digest was there to compare with


def _fetch(address: _Address, names: list[str], revision: str, listing: _Listing) -> tuple[Path, dict[str, _Check]]:
    """Bring files into the cache and check them: the folder of their commit, and what was checked."""
    from huggingface_hub import constants, hf_hub_download

    checks: dict[str, _Check] = {}
    snapshot = Path()
    for name in names:
        with _readable_errors(address):
            path = Path(
                hf_hub_download(
                    address.repo,
                    name,
                    revision=revision,
                    endpoint=constants.ENDPOINT,
                    cache_dir=constants.HF_HUB_CACHE,
                    local_files_only=listing.unreached is not None,
                )
            )
        checks[name] = _check_digest(path, listing.files[name])
        snapshot = path.parents[name.count("/")]
        revision = snapshot.name  # whatever follows is of the same commit, even if the branch moves meanwhile
    return snapshot, checks


def _check_digest(path: Path, listed: str | None) -> _Check:
    """Compare a cached file with the digest that names its blob, or with the listed one where links are impossible."""
    blob = path.parent / path.readlink() if path.is_symlink() else path
    expected = blob.name if path.is_symlink() else listed
    digest = file_sha256(path)
    found = digest
    if expected is not None and _COMMIT.fullmatch(expected):  # not an LFS file: git's blob id
        content = path.read_bytes()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    if expected is not None and found != expected:
        raise ValueError(
            f"{blob.resolve()}: the file is damaged, its checksum is {found} and the hub's {expected}; delete it and "
            "download it again"
        )
    return _Check(digest, by_hub=expected is not None)


def _shard_names(path: Path, index_name: str) -> list[str]:
    """The files an index points to, as names inside the repository; they lie beside the index."""
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{index_name}: a shard index of more than {MAX_INDEX_BYTES} bytes is not one")
    try:
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        plain = all(_is_plain(shard) and "/" not in shard for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index_name}: not a shard index, which holds weight_map: name of tensor -> file") from error
    if not shards or not plain:
        raise ValueError(f"{index_name}: shards must be plain file names beside the index, not {shards[:3]}")
    return [str(PurePosixPath(index_name).with_name(shard)) for shard in shards]
