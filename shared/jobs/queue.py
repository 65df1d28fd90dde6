"""The message queue: Redis through kombu, in the format of Celery's protocol 2.

A message is only a hint that a job may be due; the job's state is in SQL. Terms as in AMQP: a
message is *ready* until a worker receives it, then *unacknowledged* until that worker acks it.
Each delivery has a delivery tag.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import kombu
import redis
from kombu.exceptions import KombuError
from kombu.exceptions import OperationalError as KombuOperationalError
from kombu.utils.url import maybe_sanitize_url

from shared.errors import BrokerUnavailable

if TYPE_CHECKING:
    import celery

TASK = "inpaint.run_job"

# Highest first. Each class has its own Redis list, so that an urgent job need not wait for
# messages that are already published. Within a class the order of dispatch decides.
PRIORITY_CLASSES = (range(1, 1001), range(1), range(-1000, 0))
_BROKER_PRIORITIES = (0, 3, 6)

TRANSPORT_OPTIONS = {
    # Far above the longest job: leases detect a lost worker, this only removes what dead
    # workers left in Redis. A shorter time would deliver messages of running jobs again.
    "visibility_timeout": 24 * 3600,
    "socket_timeout": 30,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 25,
    "priority_steps": list(_BROKER_PRIORITIES),
}


class MessageId(NamedTuple):
    """The Celery task id, "JOB-ATTEMPT". ``attempt`` is the job's when it was dispatched."""

    job: int
    attempt: int

    @classmethod
    def parse(cls, text: str) -> MessageId:
        job, _, attempt = text.partition("-")
        return cls(job=int(job), attempt=int(attempt))

    def __str__(self) -> str:
        return f"{self.job}-{self.attempt}"


@dataclass(frozen=True, kw_only=True)
class Message:
    """A hint that a job is due. It is stale once the job's ``attempt`` has grown.

    exclusive: the job lost a worker; the next one runs no other job meanwhile.
    """

    job: int
    attempt: int
    engine: str
    priority: int = 0
    exclusive: bool = False

    @property
    def id(self) -> MessageId:
        return MessageId(job=self.job, attempt=self.attempt)


def queue_name(engine: str) -> str:
    """The Celery queue of an engine."""
    return f"inpaint.{engine}"


class Queue:
    """Publishes messages and inspects the ones in Redis.

    All methods raise BrokerUnavailable if Redis does not answer.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection = self._connect()

    def _connect(self) -> Any:
        options = TRANSPORT_OPTIONS | {"max_retries": 1, "interval_start": 0.1}
        return kombu.Connection(self.url, transport_options=options)

    def publish(self, messages: Sequence[Message]) -> None:
        """Publishes in order, pipelined: 15 times as fast as one ``send_task`` per message."""
        if not messages:
            return
        with self._translate_errors():
            producer: Any = kombu.Producer(self._connection.default_channel, serializer="json")
            with producer.batch():
                for message in messages:
                    _publish(producer, message)

    def ready_messages(self, engine: str) -> set[MessageId]:
        """The messages that no worker has received yet.

        Unacknowledged ones are left out: a live worker acquires the job at once, and those of
        a dead worker have to be published again.
        """
        with self._translate_errors():
            client = self._channel().client
            lists = [client.lrange(name, 0, -1) for name in self._lists(engine)]
        messages = [json.loads(raw) for raw_messages in lists for raw in raw_messages]
        return {_message_id(message) for message in messages if _is_ours(message)}

    def unacked_messages(self, engine: str) -> dict[str, MessageId]:
        """The messages that were delivered and not acknowledged, by delivery tag."""
        with self._translate_errors():
            channel = self._channel()
            raw_by_tag = channel.client.hgetall(channel.unacked_key)
        # kombu stores each as [message, exchange, routing key].
        deliveries = {_text(tag): json.loads(raw) for tag, raw in raw_by_tag.items()}
        return {
            tag: _message_id(message)
            for tag, (message, _exchange, routing_key) in deliveries.items()
            if _is_ours(message) and routing_key == queue_name(engine)
        }

    def discard_unacked(self, delivery_tags: Sequence[str]) -> None:
        """Deletes unacknowledged messages; later acks of them are no-ops."""
        if not delivery_tags:
            return
        with self._translate_errors():
            channel = self._channel()
            channel.client.hdel(channel.unacked_key, *delivery_tags)
            channel.client.zrem(channel.unacked_index_key, *delivery_tags)

    def length(self, engine: str) -> int:
        """The number of ready messages."""
        with self._translate_errors():
            client = self._channel().client
            return sum(int(client.llen(name)) for name in self._lists(engine))

    def ping(self) -> str:
        """Redis's version."""
        with self._translate_errors():
            return str(self._channel().client.info("server")["redis_version"])

    def close(self) -> None:
        self._connection.release()

    def _channel(self) -> Any:
        return self._connection.default_channel

    def _lists(self, engine: str) -> list[str]:
        """The Redis lists of an engine's queue, one per priority class."""
        channel = self._channel()
        return [channel._q_for_pri(queue_name(engine), step) for step in _BROKER_PRIORITIES]

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except (redis.RedisError, KombuError, KombuOperationalError, OSError) as error:
            # The connection may still hold part of a reply, which the next command would read
            # as its own; so every error opens a new one.
            self._connection.release()
            self._connection = self._connect()
            raise BrokerUnavailable(f"broker {self}: {str(error).rstrip('.')}") from error

    def __str__(self) -> str:
        return str(maybe_sanitize_url(self.url))


def _publish(producer: Any, message: Message) -> None:
    priority = next(
        level
        for level, priorities in zip(_BROKER_PRIORITIES, PRIORITY_CLASSES, strict=True)
        if message.priority in priorities
    )
    message_id = str(message.id)
    # Protocol 2: the body is (args, kwargs, embed); the headers name the task.
    producer.publish(
        ([message.job, message.attempt, message.exclusive], {}, {}),
        exchange="",
        routing_key=queue_name(message.engine),
        priority=priority,
        correlation_id=message_id,
        headers={"lang": "py", "task": TASK, "id": message_id, "root_id": message_id},
    )


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _is_ours(message: Any) -> bool:
    return isinstance(message, dict) and message.get("headers", {}).get("task") == TASK


def _message_id(message: Any) -> MessageId:
    return MessageId.parse(message["headers"]["id"])


def celery_app(url: str, engines: Iterable[str] = ()) -> celery.Celery:
    """The Celery application: JSON only, no result backend, late acknowledgement."""
    from celery import Celery

    app = Celery("inpaint", broker=url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        # After a failover the old master is a replica and refuses writes (READONLY). Only a new
        # connection reaches the new master.
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
        # A job that crashes its process would be redelivered at once, without end; the lease
        # and the quarantine limit its attempts instead.
        task_reject_on_worker_lost=False,
        task_serializer="json",
        worker_hijack_root_logger=False,
        # A prefetched message would wait behind a long job while other workers are idle.
        worker_prefetch_multiplier=1,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
    )
    return app


def _queue(engine: str) -> kombu.Queue:
    name = queue_name(engine)
    return kombu.Queue(name, exchange=kombu.Exchange(""), routing_key=name)
