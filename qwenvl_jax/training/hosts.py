"""What all processes of a run must agree on: how they start, and the copies of the parameters."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwenvl_jax.checkpoint.digest import digests
from qwenvl_jax.sharding import make_mesh

# What errors of work that several processes do together speak of.
_OF_CONTACT = ("Gloo", "NCCL", "coordination service", "Barrier", "heartbeat")


class HostsDiffer(RuntimeError):
    """The processes of one run are not of one mind, or hold copies that are not equal."""


class HostLost(RuntimeError):
    """Another process of the run does not answer any more."""


@contextlib.contextmanager
def telling_the_lost() -> Iterator[None]:
    """Raises: HostLost where work with the other processes fails because one of them has gone."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # jax raises either
        text = str(error)
        if jax.process_count() == 1 or not any(word in text for word in _OF_CONTACT):
            raise
        raise HostLost(
            "another process of this run has ended, or does not answer; its own last lines say "
            "why. Start all of them again: the run goes on from its newest checkpoint. Got "
            f"{text.splitlines()[0][:200]}"
        ) from error


def check_agreement(facts: Mapping[str, str]) -> None:
    """Returns when every process has the same names, and the same text under each.

    Raises:
        HostsDiffer: on every process, naming what differs and the processes that are not of the
            first one's mind.
    """
    if jax.process_count() == 1:
        return
    ours = [(*_number(name), *_number(text)) for name, text in facts.items()]
    # One process may have more settings than another, and all must gather as many.
    most = int(multihost_utils.process_allgather(np.array([len(ours)])).max())
    rows = np.zeros((most, 4), np.uint32)
    rows[: len(ours)] = np.array(ours, np.uint32).reshape(-1, 4)  # there may be none
    tables = [
        {(row[0], row[1]): (row[2], row[3]) for row in table}
        for table in multihost_utils.process_allgather(rows).tolist()
    ]
    names = {_number(name): name for name in facts}
    differ = []
    for number in sorted({number for table in tables for number in table} - {(0, 0)}):
        values = [table.get(number) for table in tables]
        others = [process for process, value in enumerate(values) if value != values[0]]
        if others:
            name = names.get(number, "something that this process does not have")
            differ.append(f"{name} on processes {others}")
    if differ:
        raise HostsDiffer(
            f"the processes of this run differ from process 0 in {'; '.join(differ)}: start all of "
            "them with the same command, code and files"
        )


def first_says(answer: bool) -> bool:
    """Returns process 0's answer on every process: others may see its files late."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer)))


def check_copies(arrays: Mapping[str, jax.Array]) -> None:
    """Returns when all copies of every part of every array are bit-equal, on all devices.

    Only arrays with copies are looked at: those that are not split over all devices.

    Raises:
        HostsDiffer: on every process, naming the first such array and its devices.
    """
    rows, names = [], {}
    for path, array in sorted(arrays.items()):
        index_of = array.sharding.devices_indices_map(array.shape)
        parts = {device: f"{path} {index}" for device, index in index_of.items()}
        if len(set(parts.values())) == len(parts):
            continue  # no copies
        names |= {_number(part): path for part in parts.values()}
        for shard in array.addressable_shards:
            # The run's mesh is the context, and refuses arrays of one device.
            with jax.set_mesh(make_mesh(devices=[shard.device])):
                digest = digests({"": shard.data})[""]
            digest = (int(digest[:8], 16), int(digest[8:], 16))
            rows.append((*_number(parts[shard.device]), *digest, shard.device.id))
    if not rows:
        return
    # Every process holds as many devices, and so as many rows, as any other.
    table = multihost_utils.process_allgather(np.array(rows, np.uint32), tiled=True)
    by_part: dict[tuple[int, int], dict[int, str]] = {}
    for *part, high, low, device in table.tolist():
        by_part.setdefault((part[0], part[1]), {})[device] = f"{high:08x}{low:08x}"
    for part, devices in by_part.items():
        if len(set(devices.values())) > 1:
            listed = ", ".join(f"{device}: {digest}" for device, digest in devices.items())
            raise HostsDiffer(
                f"the copies of {names[part]} are not equal (device: digest {listed}): a device "
                "has made an error; resume from the last checkpoint without it"
            )


def _number(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
