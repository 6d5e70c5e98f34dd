"""A release through the real client: what is sent arrives, what is read is what was sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RevisionNotFoundError,
)

from qlora_export.testing import HubServer, Limits
from tests.testing.conftest import CARD, CLIENT_WARNING, REPOSITORY, Connect, additions, publish, sha256

pytestmark = pytest.mark.filterwarnings(CLIENT_WARNING)


@pytest.mark.parametrize("part_bytes", [10**9, 100_000, 99_999])
def test_a_release_arrives_and_comes_back(connect: Connect, release: Path, tmp_path: Path, part_bytes: int) -> None:
    with HubServer(limits=Limits(part_bytes=part_bytes, page_rows=3)) as hub:
        api = connect(hub)
        commit = publish(api, release)
        repository = hub.repositories[REPOSITORY]
        assert (repository.head(), repository.private) == (commit.oid, True)
        assert [item.title for item in repository.commits()] == ["release", "initial commit"]
        assert api.verify_repo_checksums(REPOSITORY, local_dir=release).missing_paths == [".gitattributes"]
        rows = {row.path: row for row in api.list_repo_tree(REPOSITORY, recursive=True)}
        shard = release / "model-00001-of-00002.safetensors"
        assert rows[shard.name].lfs.sha256 == sha256(shard)
        assert rows["config.json"].lfs is None
        assert len(rows) == 7
        folder = snapshot_download(REPOSITORY, endpoint=hub.endpoint, token="any", cache_dir=tmp_path / "cache")
        for path in release.rglob("*"):
            if path.is_file():
                assert (Path(folder) / path.relative_to(release)).read_bytes() == path.read_bytes()
        parts = [record.path for record in hub.requests if "/part/" in record.path]
        assert len(parts) == {10**9: 0, 100_000: 3, 99_999: 3}[part_bytes]


def test_what_is_there_is_not_sent_again(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        first = publish(api, release)
        again = publish(api, release)
        assert again.oid == first.oid
        assert len(hub.repositories[REPOSITORY].commits()) == 2
        assert sum(record.method == "PUT" for record in hub.requests) == 3


def test_shards_go_up_one_by_one_before_the_commit(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        planned = additions(release)
        for addition in planned:
            api.preupload_lfs_files(REPOSITORY, [addition])
        assert list(hub.repositories[REPOSITORY].files()) == [".gitattributes"]
        stored = sum(record.method == "PUT" for record in hub.requests)
        api.create_commit(REPOSITORY, planned, commit_message="release")
        assert sum(record.method == "PUT" for record in hub.requests) == stored == 3
        assert len(hub.repositories[REPOSITORY].files()) == 6


def test_a_commit_on_a_head_that_has_moved_is_refused(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        parent = api.repo_info(REPOSITORY).sha
        api.create_commit(REPOSITORY, [CommitOperationAdd("note.txt", b"first")], commit_message="other")
        with pytest.raises(HfHubHTTPError) as refused:
            publish(api, release, parent_commit=parent)
        assert refused.value.response.status_code == 412
        assert sorted(hub.repositories[REPOSITORY].files()) == [".gitattributes", "note.txt"]


def test_files_and_folders_are_removed(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        publish(api, release)
        gone = [CommitOperationDelete("config.json"), CommitOperationDelete("onnx/")]
        api.create_commit(REPOSITORY, gone, commit_message="fewer")
        assert "config.json" not in hub.repositories[REPOSITORY].files()
        assert "onnx/model.onnx" not in hub.repositories[REPOSITORY].files()
        with pytest.raises(EntryNotFoundError):
            api.create_commit(REPOSITORY, gone[:1], commit_message="again")
        assert len(hub.repositories[REPOSITORY].commits()) == 3


def test_a_pull_request_is_proposed_extended_and_merged(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        proposed = publish(api, release, create_pr=True)
        repository = hub.repositories[REPOSITORY]
        assert (proposed.pr_num, proposed.pr_revision) == (1, "refs/pr/1")
        assert list(repository.files()) == [".gitattributes"]
        more = [CommitOperationAdd("note.txt", b"more")]
        api.create_commit(REPOSITORY, more, commit_message="more", revision="refs/pr/1")
        assert repository.read("refs/pr/1", "note.txt") == b"more"
        assert repository.pull_requests[1].status == "open"
        assert api.get_discussion_details(REPOSITORY, 1).is_pull_request
        assert [item.num for item in api.get_repo_discussions(REPOSITORY)] == [1]
        assert {row.path for row in api.list_repo_tree(REPOSITORY, revision="refs/pr/1")} >= {"note.txt", "onnx"}
        refs = api.list_repo_refs(REPOSITORY, include_pull_requests=True)
        assert refs.pull_requests[0].target_commit == repository.head("refs/pr/1")
        api.merge_pull_request(REPOSITORY, 1, comment="good")
        assert repository.pull_requests[1].status == "merged"
        assert len(repository.files()) == 7


def test_an_empty_pull_request_is_a_draft(connect: Connect) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        opened = api.create_pull_request(REPOSITORY, title="soon")
        assert (opened.num, opened.status) == (1, "draft")
        change = [CommitOperationAdd("note.txt", b"now")]
        api.create_commit(REPOSITORY, change, commit_message="now", revision=opened.git_reference)
        assert api.get_discussion_details(REPOSITORY, 1).status == "open"
        api.change_discussion_status(REPOSITORY, 1, "closed")
        with pytest.raises(HfHubHTTPError, match="is closed"):
            api.merge_pull_request(REPOSITORY, 1)


def test_tags_and_branches(connect: Connect, release: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        commit = publish(api, release)
        api.create_tag(REPOSITORY, tag="v1", revision=commit.oid)
        with pytest.raises(HfHubHTTPError) as taken:
            api.create_tag(REPOSITORY, tag="v1", revision=commit.oid)
        assert taken.value.response.status_code == 409
        api.create_branch(REPOSITORY, branch="next", revision=commit.oid)
        api.create_commit(REPOSITORY, [CommitOperationAdd("a", b"a")], commit_message="a", revision="next")
        refs = api.list_repo_refs(REPOSITORY)
        assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", commit.oid)]
        assert {branch.name for branch in refs.branches} == {"main", "next"}
        assert hub.repositories[REPOSITORY].tags == {"v1": commit.oid}
        assert [item.title for item in api.list_repo_commits(REPOSITORY, revision="next")][:2] == ["a", "release"]
        api.delete_branch(REPOSITORY, branch="next")
        api.delete_tag(REPOSITORY, tag="v1")
        with pytest.raises(RevisionNotFoundError):
            api.list_repo_commits(REPOSITORY, revision="v1")
        with pytest.raises(HfHubHTTPError, match="v1 is no branch"):
            hub.repositories[REPOSITORY].put_tag("v1", "main")
            api.create_commit(REPOSITORY, [CommitOperationAdd("a", b"a")], commit_message="a", revision="v1")


def test_a_card_is_checked_before_anything_is_sent(connect: Connect, release: Path) -> None:
    (release / "README.md").write_text(CARD.replace("acme/base", "/models/base"))
    with HubServer() as hub:
        with pytest.raises(ValueError, match='"base_model" with value "/models/base" is not valid'):
            publish(connect(hub), release)
        assert not any("/commit/" in record.path for record in hub.requests)


def test_upload_mode_follows_rules_size_and_content(connect: Connect) -> None:
    with HubServer(limits=Limits(regular_bytes=1000)) as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        files = {"a.safetensors": b"text", "big.json": b" " * 1001, "model.onnx.data": b"a\0b", "small.json": b"{}"}
        change = [CommitOperationAdd(name, content) for name, content in files.items()]
        change.append(CommitOperationAdd("empty.bin", b""))
        api.create_commit(REPOSITORY, change, commit_message="all")
        repository = hub.repositories[REPOSITORY]
        large = {path for path, entry in repository.files().items() if entry.sha256}
        assert large == {"a.safetensors", "big.json", "model.onnx.data"}
        rules = repository.read("main", ".gitattributes").decode()
        assert "big.json filter=lfs" in rules and "a.safetensors" not in rules
        assert len(repository.files()) == 6


def test_gitignore_leaves_files_out(connect: Connect) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY)
        names = (".gitignore", "kept.txt", "run.log", "cache/a.txt", "cache/keep.log")
        contents = dict.fromkeys(names, b"x") | {".gitignore": b"*.log\ncache/\n!keep.log\n"}
        change = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(REPOSITORY, change, commit_message="all")
        assert sorted(hub.repositories[REPOSITORY].files()) == [".gitattributes", ".gitignore", "kept.txt"]


def test_other_kinds_of_repositories_have_their_prefix(connect: Connect, tmp_path: Path) -> None:
    with HubServer() as hub:
        api = connect(hub)
        api.create_repo(REPOSITORY, repo_type="dataset")
        change = [CommitOperationAdd("rows.parquet", b"PAR1" * 9)]
        api.create_commit(REPOSITORY, change, commit_message="rows", repo_type="dataset")
        path = hf_hub_download(
            REPOSITORY, "rows.parquet", repo_type="dataset", endpoint=hub.endpoint, cache_dir=tmp_path, token=False
        )
        assert Path(path).read_bytes() == b"PAR1" * 9
        assert list(hub.repositories) == [f"datasets/{REPOSITORY}"]
