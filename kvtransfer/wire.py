"""The KV plane's messages, to and from what this room works with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2

from kvtransfer.errors import (
    BlocksNotHeldError,
    InvalidFetchError,
    KvError,
    KvSourceLostError,
    LayoutMismatchError,
    LeaseLostError,
    NoTransportError,
    RegionDeniedError,
    WrongTenantError,
)
from kvtransfer.keys import KEY_BYTES
from kvtransfer.layout import Component, KvLayout
from kvtransfer.pieces import Piece
from kvtransfer.rpc_status import status_of
from kvtransfer.transports.base import Offer
from tandem.kvtransfer.v1 import kvtransfer_pb2 as pb

NAME_BYTES = 512
LAYOUT_FIELD_BYTES = 4096
FEW = 32
"""Offers, and fields of a layout, that a request may have."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A fetch as its sink asks for it."""

    fetch_id: str
    lease_id: str
    kv_layout: str
    layout_fields: Mapping[str, str]
    keys: tuple[bytes, ...]
    offers: tuple[Offer, ...]
    held_only: bool = False
    tenant: str = ""
    region: str = ""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A fetch as its source agreed to it."""

    ticket: Offer
    why: str
    lease_seconds: float
    generations_offset: int


def layout_to(layout: KvLayout) -> pb.KvLayout:
    """A source's layout."""
    return pb.KvLayout(
        model=layout.model,
        layers=layout.layers,
        block_tokens=layout.block_tokens,
        components=[
            pb.KvComponent(
                name=c.name,
                dtype=c.dtype,
                heads=c.heads,
                width=c.width,
                total_heads=c.total_heads,
                scale=c.scale,
            )
            for c in layout.components
        ],
        shard=layout.shard,
        shards=layout.shards,
        interleaved=layout.interleaved,
    )


def layout_of(said: pb.KvLayout) -> KvLayout:
    """A layout. Raises ValueError for one that can't be."""
    return KvLayout(
        said.model,
        said.layers,
        said.block_tokens,
        tuple(
            Component(
                c.name,
                c.dtype,
                c.heads,
                c.width,
                c.total_heads,
                c.scale if c.HasField("scale") else None,
            )
            for c in said.components
        ),
        said.shard,
        said.shards,
        said.interleaved,
    )


def layout_from(message: pb.DescribeResponse) -> KvLayout:
    """A source's layout. Raises LayoutMismatchError if it has none that can be."""
    try:
        layout = layout_of(message.layout)
    except ValueError as error:
        field = str(error).partition(":")[0]
        raise LayoutMismatchError(
            f"the source's KV layout can't be: {error}", field=field
        ) from error
    if layout.fingerprint != message.kv_layout:
        raise LayoutMismatchError.between(message.layout_fields, layout.fields())
    return layout


def offer_to(offer: Offer) -> pb.TransportOffer:
    """To the wire."""
    return pb.TransportOffer(name=offer.name, attributes=offer.attributes)


def offer_from(message: pb.TransportOffer) -> Offer:
    """From the wire."""
    return Offer(message.name, dict(message.attributes))


def wanted_to(
    fetch_id: str,
    lease_id: str,
    layout: KvLayout,
    keys: Sequence[bytes],
    offers: Iterable[Offer],
    *,
    held_only: bool = False,
    tenant: str = "",
    region: str = "",
) -> pb.FetchRequest:
    """A sink's request."""
    return pb.FetchRequest(
        fetch_id=fetch_id,
        lease_id=lease_id,
        kv_layout=layout.fingerprint,
        layout_fields=layout.fields(),
        keys=keys,
        offers=[offer_to(o) for o in offers],
        held_only=held_only,
        tenant=tenant,
        region=region,
    )


def lease_id_from(lease_id: str) -> str:
    """A lease's name. Raises InvalidFetchError if it is empty or too long to be remembered."""
    if not lease_id:
        raise InvalidFetchError("lease_id: empty is not allowed", field="lease_id")
    _short("lease_id", lease_id)
    return lease_id


def wanted_from(message: pb.FetchRequest, most_keys: int) -> Wanted:
    """What a sink asks for. Raises InvalidFetchError that names the field."""
    lease_id_from(message.lease_id)
    # Before anything is made of them.
    if not message.keys:
        raise InvalidFetchError("keys: none is not allowed; at least one is needed", field="keys")
    if len(message.keys) > most_keys:
        raise InvalidFetchError(
            f"keys: {len(message.keys)} are more than the blocks here", field="keys"
        )
    for field in ("fetch_id", "kv_layout", "tenant", "region"):
        _short(field, getattr(message, field))
    for name, value in message.layout_fields.items():
        _short("layout_fields", name)
        _short("layout_fields", value, LAYOUT_FIELD_BYTES)
    _require_few("layout_fields", len(message.layout_fields))
    _require_few("offers", len(message.offers))
    for offer in message.offers:
        _short("offers", offer.name)
    keys = tuple(message.keys)
    if any(len(key) != KEY_BYTES for key in keys):
        raise InvalidFetchError(f"keys: each must have {KEY_BYTES} bytes", field="keys")
    if len(set(keys)) != len(keys):
        raise InvalidFetchError("keys: the same one twice is not allowed", field="keys")
    return Wanted(
        message.fetch_id,
        message.lease_id,
        message.kv_layout,
        dict(message.layout_fields),
        keys,
        tuple(offer_from(o) for o in message.offers),
        message.held_only,
        message.tenant,
        message.region,
    )


def _short(field: str, value: str, most: int = NAME_BYTES) -> None:
    if len(value) > most or len(value.encode()) > most:
        raise InvalidFetchError(f"{field}: longer than {most} bytes is not allowed", field=field)


def _require_few(field: str, count: int) -> None:
    if count > FEW:
        raise InvalidFetchError(f"{field}: {count} are more than {FEW}", field=field)


def opened_to(agreement: Agreement) -> pb.FetchResponse:
    """A source's first answer."""
    return pb.FetchResponse(
        opened=pb.FetchOpened(
            transport=offer_to(agreement.ticket),
            why=agreement.why,
            lease_ms=round(agreement.lease_seconds * 1000),
            generations_offset=agreement.generations_offset,
        )
    )


def opened_from(message: pb.FetchResponse) -> Agreement | None:
    """The source's first answer, None if this is another."""
    if message.WhichOneof("message") != "opened":
        return None
    opened = message.opened
    return Agreement(
        offer_from(opened.transport), opened.why, opened.lease_ms / 1000, opened.generations_offset
    )


def ready_to(pieces: Iterable[Piece]) -> pb.FetchResponse:
    """Pieces that can be read."""
    return pb.FetchResponse(
        ready=pb.FetchReady(
            pieces=[
                pb.Piece(
                    key_index=p.key_index,
                    first_layer=p.first_layer,
                    layers=p.layers,
                    offset=p.offset,
                    length=p.length,
                    generation=p.generation,
                    checksum=p.checksum,
                )
                for p in pieces
            ]
        )
    )


def ready_from(message: pb.FetchResponse) -> list[Piece]:
    """Pieces that can be read."""
    return [
        Piece(
            key_index=p.key_index,
            first_layer=p.first_layer,
            layers=p.layers,
            offset=p.offset,
            length=p.length,
            generation=p.generation,
            checksum=p.checksum,
        )
        for p in message.ready.pieces
    ]


_AS_THEY_ARE: dict[str, type[KvError]] = {
    kind.reason: kind
    for kind in (
        LayoutMismatchError,
        NoTransportError,
        InvalidFetchError,
        WrongTenantError,
        RegionDeniedError,
    )
}
_SOURCE_LOST = {kind.reason for kind in (LeaseLostError, BlocksNotHeldError)}


def error_from(error: grpc.aio.AioRpcError, address: str) -> KvError:
    """What a failed call means for the sink.

    A refusal that would come again wherever the sink asked is that error; all else means that the
    source is lost to it.
    """
    status = status_of(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if not detail.Unpack(info):
            continue
        words = error.details() or info.reason
        found: KvError | None = None
        if info.reason in _AS_THEY_ARE:
            found = _AS_THEY_ARE[info.reason](words)
        elif info.reason in _SOURCE_LOST:
            found = KvSourceLostError(words, cause=info.reason, address=address)
        if found is not None:
            found.metadata = {**info.metadata, **found.metadata}
            return found
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        words = "it did not have everything ready in time"
    else:
        words = f"{code.name}: {error.details() or 'no details'}"
    return KvSourceLostError(f"source {address}: {words}", cause=code.name, address=address)
