"""One HTTP/2 connection over a byte stream that is already connected: a socket pair to a virtio-serial port, or vsock.

The state machine is h2; this file moves bytes between it and an asyncio transport, and turns whatever goes wrong into
one typed error. It isn't grpclib, for three reasons that can't be mended from outside: grpclib ends a call by
cancelling the *task* that waits and then swallows the cancellation, so one that the caller asked for at that moment is
lost; a receive that is cancelled leaves half a message behind; and its events run in callbacks whose exceptions asyncio
prints, with the guest's bytes in them. This class holds no task, so there is none to leak.

Flow control: a stream has a window of 2 MiB, acknowledged as its messages are taken; the connection's window is as
large as HTTP/2 allows, so that a stream which nobody reads never blocks another one (agent.proto).
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Self, cast

from h2.config import H2Configuration
from h2.connection import ConnectionState, H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    RemoteSettingsChanged,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    UnknownFrameReceived,
    WindowUpdated,
)
from h2.exceptions import TooManyStreamsError
from h2.frame_buffer import FrameBuffer
from h2.settings import SettingCodes, Settings
from hyperframe.frame import ExtensionFrame, Frame

from pykata.agent import bulk
from pykata.agent.bulk import OVER, STAGING_DONE
from pykata.agent.bulk import WINDOW as BULK_WINDOW
from pykata.agent.early import AnswerAhead, EarlyStream
from pykata.agent.guard import BYTES_PER_TOKEN, EARLY, MAX_FRAME, FrameGuard
from pykata.agent.large import LargeFrames
from pykata.agent.parking import CLONE, MARK, RUN, Greeting, Parking, ahead
from pykata.agent.short import Answer
from pykata.agent.staging import Staging
from pykata.agent.stream import Headers, Stream
from pykata.errors import AgentError, AgentLostError, AgentProtocolError, printable

STREAM_WINDOW = 2 * 1024 * 1024
CONNECTION_WINDOW = 2**31 - 1
RECEIVE_SIZE = 128 * 1024       # bytes taken from the socket at once
DENSE_SIZE = 8 * 1024           # ... after frames that were tiny: bounds how long one callback holds up the event loop
DENSE = 512                     # bytes of a frame, below which it is tiny
WRITE_HIGH_WATER = 256 * 1024   # senders wait above this many bytes that the agent hasn't read ...
WRITE_LIMIT = 1024 * 1024       # ... and answers to its own frames (acks, window updates) may add up to this


class Scratch(threading.local):
    """What a thread's event loop receives into. It is copied at once, so one does for all channels: 128 KiB each would
    be most of what the host keeps for a sandbox."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(RECEIVE_SIZE))


scratch = Scratch()


class QuietFrames(FrameBuffer):
    """h2 formats every frame it gets, all of its payload in hex, for a log that is off. This spares it a third of the
    time that a 64 KiB message takes."""

    def __next__(self) -> Frame:
        frame = super().__next__()
        frame._body_repr = str  # type: ignore[method-assign]
        return frame


class Channel(asyncio.BufferedProtocol):
    """The host's end of the connection. :meth:`open` starts a call; an error ends all of them."""

    def __init__(self, *, client_side: bool = True, held: bool = False) -> None:
        self._h2 = H2Connection(
            H2Configuration(
                client_side=client_side,
                header_encoding=False,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._h2.incoming_buffer = QuietFrames(server=not client_side)
        self._guard = FrameGuard(self._take_bulk) if client_side else None
        self._streams: dict[int, Stream] = {}
        self._answers: dict[int, Answer] = {}
        self.staging: Staging | None = None
        """The way beside the port, where there is one."""
        self._numbers = count(2, 2)     # of short commands: the host's streams have odd ones
        self._receive_size = RECEIVE_SIZE
        self._greeting = Greeting()
        self._incoming: Callable[[bytes], bytes] = self._greeting
        self._transport: asyncio.Transport | None = None
        self._large: LargeFrames | None = None
        self._failure: tuple[type[AgentError], str] | None = None
        self._writable = asyncio.Event()
        self._is_full = False           # of what the agent hasn't read
        self._withheld: bytearray | None = None
        self._stream_closed = asyncio.Event()
        self._ready = asyncio.Event()
        self._closed = asyncio.Event()
        self.is_held = held
        """Nothing of HTTP/2 was sent yet; it is when something is to be said that can't come ahead of it."""

    @classmethod
    async def over(cls, sock: socket.socket, *, greeting: bytes = b"", parked: bool = False) -> Self:
        """A channel over ``sock``, which it owns from now on.

        ``greeting`` is that of an agent that was saved and goes on in another machine: ``parked``, it has sent it
        before; else it is still to come, behind what was under way.
        """
        sock.setblocking(False)
        try:
            made = partial(cls, held=True) if greeting else cls
            _, protocol = await asyncio.get_running_loop().create_connection(made, sock=sock)
        except BaseException:
            sock.close()
            raise
        if protocol._guard:
            protocol._large = LargeFrames(sock, protocol._guard, protocol.received, protocol._move_bulk)
        if parked:
            protocol.received(greeting)
        elif greeting:
            protocol._incoming = protocol._greeting = Greeting(greeting)
        return protocol

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        settings = {
            SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            SettingCodes.MAX_FRAME_SIZE: MAX_FRAME,
            SettingCodes.MAX_CONCURRENT_STREAMS: 2**31 - 1,
            SettingCodes.MAX_HEADER_LIST_SIZE: H2Connection.DEFAULT_MAX_HEADER_LIST_SIZE,
        }
        if self._h2.config.client_side:
            settings[SettingCodes.ENABLE_PUSH] = 0
        # As the first settings rather than a change of them, so that they hold from the first byte on.
        self._h2.local_settings = Settings(client=bool(self._h2.config.client_side), initial_values=settings)
        self._h2.max_inbound_frame_size = MAX_FRAME
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - self._h2.inbound_flow_control_window)
        self._writable.set()
        self.flush()

    def get_buffer(self, sizehint: int) -> memoryview:
        # asyncio is about to receive: what comes before that is out of its way. What is left is less, or nothing.
        if self._large and self._large.is_next and self._incoming is self._greeting and not self._failure:
            self._receive_large(self._large)
        return scratch.view[: self._receive_size]

    def _receive_large(self, frames: LargeFrames) -> None:
        try:
            frames.receive()
        except OSError:
            pass                        # nothing is there, or the connection has failed: asyncio sees which
        except Exception as exc:
            self._fail_by(exc)

    def buffer_updated(self, nbytes: int) -> None:
        self.received(scratch.view[:nbytes])

    def received(self, data: bytes | memoryview) -> None:
        """Take in what the agent sent."""
        if self._failure:
            return
        nbytes = len(data)
        try:
            if self._guard and self._incoming is self._greeting:
                data = data[self._guard.take_bulk(memoryview(data)) :]
                if not data:
                    return
            data = self._incoming(bytes(data))
            if self._guard:
                data, frames = self._guard.feed(data)
                self._receive_size = DENSE_SIZE if frames * DENSE > nbytes + DENSE else RECEIVE_SIZE
            if not data:
                return
            for event in self._h2.receive_data(data):
                self._process(event)
            self.flush()
        except Exception as exc:  # what h2 and hpack raise for hostile input isn't one family
            self._fail_by(exc)

    def _fail_by(self, exc: Exception) -> None:
        if isinstance(exc, AgentError):
            self.fail(type(exc), exc.message)
            return
        said = printable(str(exc).encode("utf-8", "backslashreplace"))
        self.fail(AgentProtocolError, f"the agent broke the HTTP/2 protocol: {type(exc).__name__}: {said}")

    def pause_writing(self) -> None:
        self._is_full = True
        self._writable.clear()

    def resume_writing(self) -> None:
        self._is_full = False
        if self._withheld is None:
            self._writable.set()

    def withhold(self) -> None:
        """Keep what is written from now on here, until :meth:`release`.

        The port of a machine that is saved may have the beginning of a frame, and the agent would take what its next
        host says for the rest. Once it has answered something, it has read all that was written before that.
        """
        if self._withheld is None and not self._failure:
            self._withheld = bytearray()
            self._writable.clear()

    def release(self) -> None:
        """Write what was kept, and what comes."""
        kept, self._withheld = self._withheld, None
        if kept:
            self._put(bytes(kept))
        if not self._is_full:
            self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.fail(AgentLostError, f"the connection to the agent ended{f': {exc}' if exc else ''}")
        self._closed.set()

    # What streams and callers use.

    @property
    def h2(self) -> H2Connection:
        """The state machine; only for :class:`Stream`."""
        return self._h2

    def check(self) -> None:
        """Raises what ended the connection, if something did."""
        if self._failure:
            kind, message = self._failure
            raise kind(message)

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    async def ended(self) -> AgentError:
        """Wait until the connection has ended; returns what ended it."""
        await self._closed.wait()
        assert self._failure is not None
        kind, message = self._failure
        return kind(message)

    def fail(self, kind: type[AgentError], message: str) -> None:
        """End the connection: every call in progress raises ``kind(message)``. Only the first reason counts."""
        if self._failure:
            return
        self._failure = (kind, message)
        if self._transport:
            self._transport.abort()     # not close(): that would wait for an agent that doesn't read
        self._writable.set()
        self._stream_closed.set()
        self._ready.set()
        for stream in self._streams.values():
            stream.wake()
        for answer in self._answers.values():
            answer.over.set()
        if self.staging:
            self.staging.recall()

    @property
    def greeting(self) -> bytes:
        """The agent's first frame, its settings."""
        return self._greeting.frame

    async def park(self) -> bytes:
        """Leave the agent waiting for its next host; returns how it has greeted that. No call may be in progress.

        This connection is at its end, its socket isn't closed: the agent would notice.
        """
        self.check()
        self._begin_http2()
        assert self._transport is not None
        parking = Parking(*(self._guard.pending if self._guard else (b"", 0)))
        self._incoming = parking
        self._transport.write(MARK)
        return await parking.done

    async def ready(self) -> None:
        """Wait until the agent runs: until the SETTINGS arrived with which it opens the connection."""
        await self._ready.wait()
        self.check()

    @property
    def takes_early(self) -> bool:
        """A Run may come ahead of HTTP/2: one at a time."""
        return self.is_held and not self._failure and EARLY not in self._streams

    @property
    def takes_clone(self) -> bool:
        """Clone may come ahead of HTTP/2: alone."""
        return self.is_held and not self._streams

    def begin_early(self, request: bytes) -> EarlyStream:
        """Such a Run, with its first message."""
        stream = EarlyStream(self)
        self._await(stream)
        self._write_ahead(ahead(RUN, request))
        return stream

    def call_ahead(self, request: bytes) -> AnswerAhead:
        """Clone, ahead of HTTP/2."""
        stream = AnswerAhead(self)
        self._await(stream)
        self._write_ahead(ahead(CLONE, request))
        return stream

    def _await(self, stream: Stream) -> None:
        self._streams[stream.id] = stream
        if self._guard:
            self._guard.stream_opened(stream.id)

    def _write_ahead(self, data: bytes) -> None:
        if self._transport is not None and not self._failure:
            self._transport.write(data)

    def _begin_http2(self) -> None:
        if self.is_held:
            self.is_held = False
            self.flush()

    async def open(self, headers: Headers) -> Stream:
        """A new stream, with these request headers. They are sent along with its first message."""
        self._begin_http2()
        while True:
            await self.writable()
            try:
                stream_id = self._h2.get_next_available_stream_id()
                self._h2.send_headers(stream_id, headers)
            except TooManyStreamsError:
                self._stream_closed.clear()
                await self._stream_closed.wait()
                continue
            if self._guard:
                self._guard.stream_opened(stream_id)
            stream = self._streams[stream_id] = Stream(self, stream_id)
            return stream

    def next_number(self) -> int:
        """The number of the next short command."""
        return next(self._numbers)

    def expect(self, number: int) -> Answer:
        """A short command is about to be sent; its answer, which someone has to :meth:`forget`."""
        if self._guard:
            self._guard.command_asked(number)
        answer = self._answers[number] = Answer()
        return answer

    def forget(self, number: int) -> None:
        """Nobody waits for that answer any more."""
        self._answers.pop(number, None)
        if self._guard:
            self._guard.command_left(number)

    def alias(self, number: int, stream: Stream) -> None:
        """Bulk frames of a short command that goes on are this stream's."""
        stream.bulk_id = number
        self._streams[number] = stream
        if self._guard:
            self._guard.stream_opened(number)

    async def writable(self) -> None:
        """Wait until the agent has read enough of what was written before."""
        while True:
            self.check()
            if self._writable.is_set():
                return
            await self._writable.wait()

    def flush(self, sent: int = 0) -> None:
        """Write what h2 has ready, ``sent`` bytes of it data."""
        if self.is_held:
            return
        data = self._h2.data_to_send()
        if self._transport is None or self._failure or not data:
            return
        if sent and self._guard:
            self._guard.credit(sent / BYTES_PER_TOKEN)
        self._put(data)
        if self._transport.get_write_buffer_size() + len(self._withheld or b"") > WRITE_LIMIT:
            self.fail(AgentProtocolError, "the agent sends without reading what it is sent")

    def write(self, data: bytes) -> None:
        """Write something beside HTTP/2, between two frames of it."""
        self._begin_http2()
        self._put(data)

    def _put(self, data: bytes) -> None:
        if self._withheld is not None:
            self._withheld += data
        elif self._transport is not None and not self._failure:
            self._transport.write(data)

    def expect_staging_answer(self) -> None:
        """The agent is about to be asked for something to be done with the disk beside the port."""
        if self._guard:
            self._guard.staging_asked()

    def close_stream(self, stream: Stream, unread: int) -> None:
        """Nobody needs the stream any more, nor ``unread`` bytes that it received. It is reset if it isn't over."""
        self._streams.pop(stream.id, None)
        self._streams.pop(stream.bulk_id, None)
        self._stream_closed.set()
        if self._failure:
            return
        if stream.id in (0, EARLY) and self._guard:
            self._guard.stream_reset(stream.id, STREAM_WINDOW + 2 * BULK_WINDOW)
        state = self._h2.streams.get(stream.id)     # h2 drops closed streams at times
        if state and not state.closed:
            self._h2.reset_stream(stream.id, ErrorCodes.CANCEL)
            if self._guard:
                self._guard.stream_reset(stream.id, STREAM_WINDOW + (2 * BULK_WINDOW if stream.bulk else 0))
                self._guard.stream_reset(stream.bulk_id, 2 * BULK_WINDOW)
        elif self._guard and stream.bulk_id != stream.id:
            self._guard.stream_closed(stream.bulk_id)
        if unread:
            self._h2.acknowledge_received_data(unread, stream.id)
        self.flush()

    async def aclose(self) -> None:
        """End the connection and give the socket back to the system."""
        is_parked = isinstance(self._incoming, Parking)     # another connection has begun on this stream
        if self._h2.state_machine.state is not ConnectionState.CLOSED and not is_parked and not self.is_held:
            self._h2.close_connection(ErrorCodes.NO_ERROR)
            self.flush()
        self.fail(AgentLostError, "the connection to the agent was closed by the host")
        await self._closed.wait()

    def _take_bulk(self, stream_id: int, flag: int, data: bytes) -> None:
        if flag == STAGING_DONE:
            if self.staging:
                self.staging.answered(data)
        elif flag >= OVER:
            if answer := self._answers.get(stream_id):
                answer.put(flag, data, whole=self._guard is None or not self._guard.is_inside)
        elif stream := self._streams.get(stream_id):
            stream.bulk_received(flag, data)

    def _move_bulk(self, stream_id: int, flag: int, sock: int, most: int) -> int:
        stream = self._streams.get(stream_id)
        return stream.move_bulk(flag, sock, most) if stream else 0

    def _process(self, event: Event) -> None:
        match event:
            case DataReceived(stream_id=stream_id, data=data, flow_controlled_length=size):
                if stream := self._streams.get(stream_id):
                    stream.data_received(data or b"", size or 0)
                elif size:
                    self._h2.acknowledge_received_data(size, stream_id)
            case RequestReceived(stream_id=stream_id, headers=headers):
                self._accept(stream_id, headers)
            case ResponseReceived(stream_id=stream_id, headers=headers) | TrailersReceived(
                stream_id=stream_id, headers=headers
            ):
                if stream := self._streams.get(stream_id):
                    stream.headers_received(headers)
            case UnknownFrameReceived(frame=ExtensionFrame() as frame) if frame.type == bulk.KIND:
                if stream := self._streams.get(frame.stream_id):
                    stream.bulk_sent(bytes(frame.body))
            case StreamReset(remote_reset=False):
                raise AgentProtocolError("the agent opened a stream's window too far")
            case StreamEnded(stream_id=stream_id) | StreamReset(stream_id=stream_id):
                self._stream_closed.set()
                if stream := self._streams.get(stream_id):
                    stream.ended(int(event.error_code or 0) if isinstance(event, StreamReset) else None)
            case WindowUpdated() | RemoteSettingsChanged():
                self._ready.set()
                for stream in self._streams.values():
                    stream.window_changed()
                self._stream_closed.set()
            case InformationalResponseReceived():
                raise AgentProtocolError("the agent sent an informational response")
            case ConnectionTerminated(error_code=code):
                name = code.name if isinstance(code, ErrorCodes) else code
                raise AgentLostError(f"the agent closed the connection: {name}")

    def _accept(self, stream_id: int, headers: Headers) -> None:
        raise AgentProtocolError(f"the agent opened a stream ({stream_id}); only the host may")
