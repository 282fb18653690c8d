"""The mandatory scenarios of the network: reset, silent, damaged and cut links.

See test_scenarios_nodes.py.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from ZODB.utils import p64

from .chaos import FULL, LIMITS, NOTICED, World, report, times, typical, within
from .proxy import Network


def network(world: World) -> Network:
    """Of a world that has one."""
    assert world.network is not None
    return world.network


def reset_clients(world: World, names: list[str], count: int, pause: float) -> float:
    """Reset `count` links of clients to these nodes, at most `pause` seconds after
    each round of attempts (a link that is lost is renewed after up to a second); the
    longest time without any commit.
    """
    net = network(world)
    start = time.monotonic()
    with world.measured() as m:
        for i in itertools.count():
            for name in names:
                net.reset(f"client{i % world.clients + 1}", name)
            if net.resets >= count:
                break
            time.sleep(world.rng.uniform(0, pause))
            assert time.monotonic() < start + 2 * count + 30, net.resets
    return m.gap


def test_13_reset_client_storage(tmp_path: Path) -> None:
    """The links of clients to storages are reset, again and again."""
    with World(tmp_path, network=True) as world:
        gap = reset_clients(world, world.storage_names, 1000 if FULL else 30, 0.1)
        if not FULL:  # another primary forgets who must stay away for a minute
            world.kill(world.primary)
        counts = world.audit()
        resets = network(world).resets
    report(13, "reset client-storage", resets=resets, gap=gap, **counts)
    assert gap <= within(2)


def test_13_reset_storage_master(tmp_path: Path) -> None:
    """The links of storages to the master are reset, and those they catch up by."""
    with World(tmp_path, network=True) as world:
        net = network(world)
        gaps = []
        for i in times(6, 100):
            storage = world.storage_names[i % 3]
            with world.measured() as m:
                net.reset(storage, world.primary)
                for _ in range(20):
                    for other in world.storage_names:
                        if other != storage:
                            net.reset(storage, other)
                    time.sleep(0.05)
                world.wait_healthy()
            gaps.append(m.gap)
        counts = world.audit()
    report(13, "reset storage links", resets=net.resets, gaps=gaps, **counts)
    assert typical(gaps) <= within(1), gaps


def test_14_reset_client_master(tmp_path: Path) -> None:
    """The links of clients to the masters are reset, again and again."""
    clients = 9 if FULL else 3  # each is connected once a second at most
    with World(tmp_path, network=True, clients=clients) as world:
        gap = reset_clients(world, world.master_names, 1000 if FULL else 12, 0.15)
        counts = world.audit()
        resets = network(world).resets
    report(14, "reset client-master", resets=resets, gap=gap, **counts)
    assert gap <= within(2)


LINKS = {
    "client-master": ("client1", "primary"),
    "client-storage": ("client1", "storage1"),
    "storage-master": ("storage1", "primary"),
    "storage-storage": ("storage1", "storage2"),
    "master-master": ("primary", "secondary"),
    "admin-master": ("admin", "primary"),
}


def ends(world: World, link: str) -> list[str]:
    """Names of the nodes of a link."""
    roles = {"primary": world.primary, "secondary": world.secondary}
    return [roles.get(name, name) for name in LINKS[link]]


@pytest.mark.parametrize("way", ["both", "to", "from"] if FULL else ["both"])
@pytest.mark.parametrize(
    "link", LINKS if FULL else ["client-storage", "storage-master"]
)
def test_15_silence(tmp_path: Path, link: str, way: str) -> None:
    """A link is silent: nothing passes, and nobody says so."""
    with World(tmp_path, network=True, limits=LIMITS) as world:
        net = network(world)
        a, b = ends(world, link)
        with world.measured() as m:
            if way != "from":
                net.silence((a, b))
            if way != "to":
                net.silence((b, a))
            time.sleep(30 if FULL else 8)
            net.heal()
        world.wait_healthy()
        assert all(process.is_alive() for process in world.processes.values())
        world.audit()
    report(15, f"silence {link} {way}", gap=m.gap, **m.errors)
    assert m.gap <= NOTICED


def test_16_unreachable_storage(tmp_path: Path) -> None:
    """Clients can't reach a healthy storage: it is put aside once a minute at most."""
    with World(tmp_path, network=True) as world:
        net = network(world)
        seconds = 150 if FULL else 10
        with world.measured() as m:
            for client in world.workers:
                net.refuse(client, "storage1")
            time.sleep(seconds)
            lost = world.said("storage1").count("connection to the primary master lost")
            net.heal()
            if not FULL:  # another primary forgets that it must stay away for a minute
                world.kill(world.primary)
        counts = world.audit()
    report(16, f"storage unreachable for {seconds} s", lost=lost, gap=m.gap, **counts)
    assert lost <= 2 + seconds // 60
    assert m.gap <= within(5)


@pytest.mark.parametrize("alone", [1, 2, 3] if FULL else [3])
def test_17_minority(tmp_path: Path, alone: int) -> None:
    """The secondary and one storage are cut off: the others go on."""
    with World(tmp_path, network=True, limits=LIMITS) as world:
        net = network(world)
        other = {world.secondary, f"storage{alone}"}
        one = {*world.ports, *world.workers, "admin"} - other
        with world.measured() as m:
            net.cut(sorted(one), sorted(other))
            time.sleep(30 if FULL else 8)
            assert world.primary in one
            net.heal()
        world.wait_healthy()
        world.audit()
    report(17, f"secondary and storage{alone} cut off", gap=m.gap, **m.errors)
    assert m.gap <= NOTICED


@pytest.mark.parametrize("alone", [1, 2, 3] if FULL else [1])
def test_17_majority(tmp_path: Path, alone: int) -> None:
    """The primary and one storage are cut off: two halves that must not both commit.

    All objects are in partitions that the storage shares with one other, which is
    lost a moment before the third: alone, it has all that the load needs.
    """
    shared = alone % 3  # partition: on storages `shared` and `shared + 1`, from 0
    partner = f"storage{(alone % 3) + 1}"
    oids = [p64(shared + 3 * i) for i in range(12)]
    with World(
        tmp_path, network=True, limits=LIMITS, clients=8, oids=oids, think=0.03
    ) as world:
        net = network(world)
        table = world.neoctl("print", "pt")[1]
        one = {world.primary, f"storage{alone}", "admin"}
        one.update(f"client{i}" for i in range(1, 6))
        other = {*world.ports, *world.workers} - one
        cut = time.monotonic()
        with world.measured() as m:
            net.cut(sorted(one), [partner])
            time.sleep(0.5)
            net.cut(sorted(one), sorted(other))
            time.sleep(30 if FULL else 12)
            healed = time.monotonic()
            net.heal()
        world.wait_healthy()
        counts = world.audit()
    report(
        17, f"primary and storage{alone} cut off", gap=m.gap, table=table,
        resumed=m.resumed(healed), **counts,
    )  # fmt: skip
    assert healed > cut
    assert m.resumed(healed) <= within(3)


def test_18_swizzle(tmp_path: Path) -> None:
    """Links are clogged one by one, and released in another order."""
    with World(tmp_path, network=True) as world:
        net, rng = network(world), world.rng
        nodes = [*world.ports, *world.workers, "admin"]
        links = [(a, b) for a in nodes for b in world.ports if a != b]
        gaps = []
        for _ in times(3, 50):
            chosen = rng.sample(links, rng.randint(1, 8))
            clog = 2.0
            with world.measured() as m:
                for a, b in chosen:
                    net.silence((a, b), (b, a))
                    time.sleep(0.05)
                time.sleep(clog)
                for a, b in rng.sample(chosen, len(chosen)):
                    net.speak((a, b), (b, a))
                    time.sleep(0.05)
            gaps.append(m.gap)
        world.audit()
    report(18, "swizzle-clog", gaps=gaps)
    assert typical(gaps) <= clog + 5, gaps


@pytest.mark.parametrize("link", LINKS if FULL else ["client-storage"])
def test_19_damage(tmp_path: Path, link: str) -> None:
    """A bit of a packet's frame or id is flipped: the connection ends.

    Where one packet becomes another one that is right, only TLS helps.
    """
    with World(tmp_path, network=True, limits=LIMITS) as world:
        net = network(world)
        gaps = []
        for i in times(4, 20):
            a, b = ends(world, link)
            with world.measured() as m:
                net.damage(*((a, b), (b, a))[i % 2], after=i // 2 % 2)
                world.neoctl("print", "ids")  # for the link of the admin
                time.sleep(1)
            gaps.append(m.gap)
            world.wait_healthy()
        if link == "master-master":
            time.sleep(NOTICED)  # or the secondary may not hear of the end
        damaged = net.damaged
        counts = world.audit()
    report(19, f"damaged {link}", damaged=damaged, gaps=gaps, **counts)
    assert typical(gaps) <= NOTICED, gaps
    if link not in ("storage-storage",):
        assert damaged
