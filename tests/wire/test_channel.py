"""The channel between two processes: whole values, in order, with their descriptors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from nbaccel.wire.channel import Channel, ChannelClosed, pair

Ends = tuple[Channel, Channel]


@pytest.fixture
def ends() -> Iterator[Ends]:
    ours, theirs = (Channel(sock) for sock in pair())
    yield ours, theirs
    ours.close()
    theirs.close()


def test_values_arrive_in_order_when_several_are_sent(ends: Ends) -> None:
    ours, theirs = ends
    for value in ("one", {"two": 2}, None, b"four" * 1000):
        ours.send(value)
    assert [theirs.recv(1)[0] for _ in range(4)] == ["one", {"two": 2}, None, b"four" * 1000]


def test_value_larger_than_the_socket_arrives_whole(ends: Ends) -> None:
    ours, theirs = ends
    value = os.urandom(8 << 20)
    sender = threading.Thread(target=ours.send, args=(value,))
    sender.start()
    assert theirs.recv(20)[0] == value
    sender.join()


def test_values_of_many_threads_are_not_mixed(ends: Ends) -> None:
    ours, theirs = ends
    blocks = [bytes([number]) * 200_000 for number in range(8)]
    senders = [threading.Thread(target=ours.send, args=(block,)) for block in blocks]
    for sender in senders:
        sender.start()
    assert sorted(theirs.recv(20)[0] for _ in blocks) == blocks
    for sender in senders:
        sender.join()


@pytest.mark.parametrize("count", [1, 5, 300], ids=str)
def test_descriptors_arrive_with_their_value(ends: Ends, count: int) -> None:
    ours, theirs = ends
    pipes = [os.pipe() for _ in range(count)]
    ours.send("before")
    ours.send("with", [write for _, write in pipes])
    ours.send("after")
    assert theirs.recv(1) == ("before", [])
    value, fds = theirs.recv(1)
    assert value == "with"
    assert theirs.recv(1) == ("after", [])
    for number, (fd, (read, write)) in enumerate(zip(fds, pipes, strict=True)):
        os.write(fd, b"%d" % number)
        assert os.read(read, 10) == b"%d" % number
        for one in (fd, read, write):
            os.close(one)


def test_recv_times_out_when_nothing_comes(ends: Ends) -> None:
    with pytest.raises(TimeoutError):
        ends[1].recv(0.05)


def test_recv_gives_what_was_sent_then_says_closed_when_the_other_end_is_gone(ends: Ends) -> None:
    ours, theirs = ends
    ours.send("last words")
    ours.close()
    assert theirs.recv(1)[0] == "last words"
    with pytest.raises(ChannelClosed):
        theirs.recv(1)


def test_send_says_closed_when_the_other_end_is_gone(ends: Ends) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.send("to nobody")


def test_drain_gives_what_is_there_and_waits_for_nothing(ends: Ends) -> None:
    ours, theirs = ends
    assert list(theirs.drain()) == []
    ours.send(1)
    ours.send(2)
    assert [value for value, _ in theirs.drain()] == [1, 2]
    assert not theirs.eof
    ours.send(3)
    ours.close()
    assert [value for value, _ in theirs.drain()] == [3]
    assert list(theirs.drain()) == []
    assert theirs.eof


def test_answers_are_still_read_when_this_end_sends_no_more(ends: Ends) -> None:
    ours, theirs = ends
    ours.shut_sending()
    with pytest.raises(ChannelClosed):
        theirs.recv(1)
    theirs.send("answer")
    assert ours.recv(1)[0] == "answer"


def test_unread_descriptors_are_closed_with_the_channel() -> None:
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = (Channel(sock) for sock in pair())
    read, write = os.pipe()
    ours.send("read")
    ours.send("never read", [write])
    os.close(write)
    assert theirs.recv(1)[0] == "read"
    theirs.close()
    ours.close()
    assert os.read(read, 1) == b""  # nobody holds the other end any more
    os.close(read)
    assert len(os.listdir("/proc/self/fd")) == before


def test_drain_gives_all_when_values_with_descriptors_lie_between(ends: Ends) -> None:
    ours, theirs = ends
    with open(os.devnull) as file:
        for number in range(4):
            ours.send(number, (file.fileno(),) if number % 2 else ())
    found = list(theirs.drain())
    assert [(value, len(fds)) for value, fds in found] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    for _, fds in found:
        for fd in fds:
            os.close(fd)


def test_encoded_value_arrives_as_if_it_was_sent_when_it_goes_to_several(ends: Ends) -> None:
    ours, theirs = ends
    frame = Channel.encode({"a": 1}, 1)
    with open(os.devnull) as file:
        for channel in ends:
            channel.send_encoded(frame, (file.fileno(),))
    for channel in (theirs, ours):
        value, fds = channel.recv(5)
        assert value == {"a": 1}
        assert os.path.samestat(os.fstat(fds[0]), os.stat(os.devnull))
        os.close(*fds)
