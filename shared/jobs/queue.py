"""Redis through kombu and Celery: hints that jobs may be due."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kombu
import redis
from kombu.exceptions import KombuError
from kombu.exceptions import OperationalError as KombuOperationalError
from kombu.utils.url import maybe_sanitize_url

from shared.errors import BrokerUnavailable

if TYPE_CHECKING:
    import celery

TASK = "inpaint.run_job"

# Highest first. Each class has a Redis list of its own, so that an urgent job does not
# wait behind the messages already published; inside a class dispatch order decides.
PRIORITY_CLASSES = (range(1, 1001), range(1), range(-1000, 0))
_BROKER_PRIORITIES = (0, 3, 6)

TRANSPORT_OPTIONS = {
    # A lost worker is noticed by its lease; this only clears what dead workers left in Redis.
    "visibility_timeout": 24 * 3600,
    "socket_timeout": 30,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 25,
    "priority_steps": list(_BROKER_PRIORITIES),
}


@dataclass(frozen=True, kw_only=True)
class Message:
    """``attempt`` is the job's when the message was made; it is stale once that has grown.

    alone: a worker was lost with this job; the next one runs nothing beside it.
    """

    job: int
    attempt: int
    engine: str
    priority: int = 0
    alone: bool = False

    @property
    def id(self) -> str:
        return f"{self.job}-{self.attempt}"


def queue_name(engine: str) -> str:
    """The Celery queue of an engine."""
    return f"inpaint.{engine}"


class Queue:
    """Publishes messages, and says which ones Redis still has.

    All methods raise BrokerUnavailable where Redis does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection = self._connect()

    def _connect(self) -> Any:
        options = TRANSPORT_OPTIONS | {"max_retries": 1, "interval_start": 0.1}
        return kombu.Connection(self.url, transport_options=options)

    def publish(self, messages: Sequence[Message]) -> None:
        """Writes Celery protocol-2 messages, pipelined."""
        if not messages:
            return
        with self._translated():
            producer: Any = kombu.Producer(self._connection.default_channel, serializer="json")
            with producer.batch():
                for message in messages:
                    _publish(producer, message)

    def ready_messages(self, engine: str) -> set[tuple[int, int]]:
        """(job, attempt) of every message that waits for a worker.

        One that a worker has taken is not among them: a live worker acquires its job within
        moments, and what a dead one took has to be published again.
        """
        with self._translated():
            client = self._channel().client
            lists = [client.lrange(name, 0, -1) for name in self._lists(engine)]
        found = [json.loads(raw) for messages in lists for raw in messages]
        return {_parse_id(message["headers"]["id"]) for message in found if _is_ours(message)}

    def unacked_messages(self, engine: str) -> dict[str, tuple[int, int]]:
        """(job, attempt) of every message that a worker has taken and not answered, by its tag."""
        with self._translated():
            channel = self._channel()
            raw = channel.client.hgetall(channel.unacked_key)
        found = {_text(tag): json.loads(value) for tag, value in raw.items()}
        return {
            tag: _parse_id(message["headers"]["id"])
            for tag, (message, _exchange, routing_key) in found.items()
            if _is_ours(message) and routing_key == queue_name(engine)
        }

    def discard_unacked(self, tags: Sequence[str]) -> None:
        """Removes messages that were taken; their workers' own answers then do nothing."""
        if not tags:
            return
        with self._translated():
            channel = self._channel()
            channel.client.hdel(channel.unacked_key, *tags)
            channel.client.zrem(channel.unacked_index_key, *tags)

    def length(self, engine: str) -> int:
        """Messages that wait for a worker."""
        with self._translated():
            client = self._channel().client
            return sum(int(client.llen(name)) for name in self._lists(engine))

    def ping(self) -> str:
        """Redis's version."""
        with self._translated():
            return str(self._channel().client.info("server")["redis_version"])

    def close(self) -> None:
        self._connection.release()

    def _channel(self) -> Any:
        return self._connection.default_channel

    def _lists(self, engine: str) -> list[str]:
        """The Redis lists of an engine, one per priority class."""
        channel = self._channel()
        return [channel._q_for_pri(queue_name(engine), step) for step in _BROKER_PRIORITIES]

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, KombuError, KombuOperationalError, OSError) as error:
            # The channel may be half-way through a reply; a fresh one is the only safe one.
            self._connection.release()
            self._connection = self._connect()
            raise BrokerUnavailable(f"broker {self}: {str(error).rstrip('.')}") from error

    def __str__(self) -> str:
        return str(maybe_sanitize_url(self.url))


def _publish(producer: Any, message: Message) -> None:
    priority = next(
        level
        for level, of_class in zip(_BROKER_PRIORITIES, PRIORITY_CLASSES, strict=True)
        if message.priority in of_class
    )
    producer.publish(
        ([message.job, message.attempt, message.alone], {}, {}),
        exchange="",
        routing_key=queue_name(message.engine),
        priority=priority,
        correlation_id=message.id,
        headers={"lang": "py", "task": TASK, "id": message.id, "root_id": message.id},
    )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _is_ours(message: Any) -> bool:
    return isinstance(message, dict) and message.get("headers", {}).get("task") == TASK


def _parse_id(message_id: str) -> tuple[int, int]:
    job, _, attempt = message_id.partition("-")
    return int(job), int(attempt)


def celery_app(url: str, engines: Iterable[str] = ()) -> celery.Celery:
    """The Celery application: JSON only, no results, acknowledged late."""
    from celery import Celery

    app = Celery("inpaint", broker=url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        # A replica refuses what a master takes; it is the connection that has to be made anew.
        broker_channel_error_retry=True,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options=TRANSPORT_OPTIONS,
        enable_utc=True,
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        task_default_exchange="",
        task_ignore_result=True,
        task_queues=[_queue(engine) for engine in engines] or None,
        task_reject_on_worker_lost=False,
        task_serializer="json",
        worker_hijack_root_logger=False,
        worker_prefetch_multiplier=1,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
    )
    return app


def _queue(engine: str) -> kombu.Queue:
    name = queue_name(engine)
    return kombu.Queue(name, exchange=kombu.Exchange(""), routing_key=name)
