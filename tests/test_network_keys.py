"""Keys and their files, and who is let in over tcp: those of the system and of its list, nobody else."""

import asyncio
import socket

import numpy as np
import pytest
import zmq
from sample_actors import until

from headrace.runtime.codec import decode, encode
from headrace.runtime.curve import Keys
from headrace.runtime.errors import LaunchError
from headrace.runtime.transport import bulk_address
from headrace.runtime.zmq_transport import ZmqTransport

ANY = "tcp://127.0.0.1:0"


def nothing(*_):
    return None


def envelope(id=1, value=None):
    return encode([1, 2, 0.0, id, value])


def value_of(env, buffers):
    return decode(env, buffers)[4]


class Pair:
    """A receiver that listens with keys, what it got, and whom it refused; closes what `add` made."""

    def __init__(self):
        self.got, self.bad, self.transports = [], [], []

    def add(self, name, keys, address=ANY):
        made = ZmqTransport(
            f"{name}#1", address, lambda *item: self.got.append(item), lambda *item: self.bad.append(item), keys=keys
        )
        self.transports.append(made)
        return made


@pytest.fixture
async def net():
    pair = Pair()
    yield pair
    for transport in pair.transports:
        await transport.close(drain_s=0.05)


# Files


def test_keys_come_back_from_their_file(tmp_path):
    friend = Keys.generate()
    keys = Keys.generate()
    keys = Keys(public=keys.public, secret=keys.secret, allowed=(friend.public,))
    keys.save(tmp_path / "keys")
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
    assert Keys.load(tmp_path / "keys") == keys
    assert keys.secret not in repr(keys)
    with pytest.raises(LaunchError, match=r"File exists; nothing was written"):
        keys.save(tmp_path / "keys")


def test_a_key_file_that_can_not_be_used_is_one_clear_error(tmp_path):
    path = tmp_path / "keys"
    with pytest.raises(LaunchError, match=r"key file .*/keys: No such file or directory; write one with"):
        Keys.load(path)
    keys, other = Keys.generate(), Keys.generate()
    keys.save(path)
    good = path.read_text()
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(LaunchError, match=rf"others may read it .*mode {mode:04o}.*chmod 600"):
            Keys.load(path)
    path.chmod(0o600)
    for text, said in [
        ("", "'public' is missing"),
        ("\x00\xff", "it is damaged"),
        (good[:20], "it is damaged"),
        (good.replace("secret", "Secret"), "'secret' is missing"),
        (good.replace(keys.public, keys.public[:-1]), "40 characters"),
        (good.replace(keys.public, "~" * 40), "40 characters"),
        (good.replace(keys.public, other.public), "does not belong to the secret key"),
        (good.replace("[]", "['x']"), "40 characters"),
        (good.replace("[]", "7"), "it is damaged"),
    ]:
        path.write_text(text, encoding="latin-1")
        with pytest.raises(LaunchError, match=f"key file .*{said}") as caught:
            Keys.load(path)
        assert "\n" not in str(caught.value) and keys.secret not in str(caught.value)
    with pytest.raises(LaunchError, match="it is no file"):
        (tmp_path / "folder").mkdir(mode=0o700)
        Keys.load(tmp_path / "folder")


# Who is let in


async def test_nodes_with_the_systems_keys_talk_by_both_ways(net):
    keys = Keys.generate()
    receiver, sender = net.add("r", keys), net.add("s", keys)
    sender.connect("r#1", receiver.address)
    head, buffers = envelope(1)
    sender.send("r#1", head, buffers)
    big = np.arange(700_000.0)
    sender.send("r#1", *envelope(2, big), bulk=True)
    await until(lambda: len(net.got) == 2)
    _, env, parts = next(item for item in net.got if len(item[2]))
    assert np.array_equal(value_of(env, parts), big) and not net.bad


async def test_a_stranger_is_refused_and_named_and_a_friend_is_let_in(net):
    keys, stranger, friend = Keys.generate(), Keys.generate(), Keys.generate()
    receiver = net.add("r", Keys(public=keys.public, secret=keys.secret, allowed=(friend.public,)))
    # Each knows the receiver's public key, as anybody may.
    for name, own in (("stranger", stranger), ("friend", friend)):
        sender = net.add(name, None)
        sender._keys = _Visitor(own, keys.public)
        sender.connect("r#1", receiver.address)
        sender.send("r#1", *envelope())
        sender.send("r#1", *envelope(), bulk=True)
    await until(lambda: len(net.got) == 2 and len(net.bad) >= 2)
    assert {who for who, _, _ in net.got} == {"friend#1"}
    assert all(f"unknown key {stranger.public}" in reason for _, reason in net.bad)


async def test_a_client_without_keys_or_with_a_wrong_server_key_is_not_heard(net):
    keys = Keys.generate()
    receiver = net.add("r", keys)
    plain, lost, good = net.add("plain", None), net.add("lost", Keys.generate()), net.add("good", keys)
    for sender in (plain, lost, good):
        sender.connect("r#1", receiver.address)
        sender.send("r#1", *envelope())
    await until(lambda: net.got)
    await asyncio.sleep(0.2)
    assert [who for who, _, _ in net.got] == ["good#1"]


async def test_an_ipc_socket_of_the_same_node_needs_no_keys(net, tmp_path):
    keys = Keys.generate()
    receiver = net.add("r", keys, f"ipc://{tmp_path}/r")
    over_tcp = receiver.listen(ANY, keys)
    for name, given, address in (("local", None, receiver.address), ("far", keys, over_tcp)):
        sender = net.add(name, given)
        sender.connect("r#1", address)
        sender.send("r#1", *envelope())
    await until(lambda: len(net.got) == 2)
    assert {who for who, _, _ in net.got} == {"local#1", "far#1"}


class _Visitor:
    """Keys of one's own, to visit a server whose public key is known."""

    def __init__(self, own, server):
        self.own, self.server = own, server

    def introduce(self, dealer):
        dealer.setsockopt(zmq.CURVE_SERVERKEY, self.server.encode())
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, self.own.public.encode())
        dealer.setsockopt(zmq.CURVE_SECRETKEY, self.own.secret.encode())


# Ports and paths


async def test_a_taken_port_is_one_clear_error_and_any_port_avoids_it(net):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"can't bind tcp://127.0.0.1:{port}: Address already in use; choose"):
            net.add("a", None, f"tcp://127.0.0.1:{port}")
        if port > 1024:
            with pytest.raises(LaunchError, match=r"can't bind tcp://127.0.0.1:\d+: Address already in use"):
                net.add("a", None, f"tcp://127.0.0.1:{port - 1}")  # Its bulk way needs that port.
    addresses = [net.add(f"n{i}", None).address for i in range(5)]
    ports = [int(a.rpartition(":")[2]) for address in addresses for a in (address, bulk_address(address))]
    assert len(set(ports)) == 10 and 0 not in ports
    with pytest.raises(LaunchError, match="Address already in use"):
        net.add("again", None, addresses[0])


async def test_a_path_where_somebody_listens_is_refused_and_a_dead_ones_is_taken(net, tmp_path):
    first = net.add("a", None, f"ipc://{tmp_path}/a")
    with pytest.raises(LaunchError, match=rf"can't bind {first.address}: another process listens there"):
        net.add("b", None, first.address)
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(dead))
    sender, receiver = net.add("s", None), net.add("r", None, f"ipc://{dead}")
    sender.connect("r#1", receiver.address)
    sender.send("r#1", *envelope())
    await until(lambda: net.got)
