"""Messages in a real Redis: Celery can read them, and none is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import redis

from shared.errors import BrokerUnavailable
from shared.jobs.queue import PRIORITY_CLASSES, TASK, Message, Queue, celery_app, queue_name
from tests import servers

ENGINE = "opencv"


@pytest.fixture
def queue(redis_url: str) -> Iterator[Queue]:
    queue = Queue(redis_url)
    yield queue
    queue.close()


def message(job: int, *, attempt: int = 0, priority: int = 0) -> Message:
    return Message(job=job, attempt=attempt, engine=ENGINE, priority=priority)


def test_published_messages_are_ready(queue: Queue) -> None:
    queue.publish([message(1), message(2, attempt=3), message(4, priority=9)])
    assert queue.length(ENGINE) == 3
    assert queue.ready_messages(ENGINE) == {(1, 0), (2, 3), (4, 0)}
    assert queue.length("sd2") == 0
    assert queue.ready_messages("sd2") == set()


def test_publishing_no_messages_does_not_connect_to_redis() -> None:
    Queue("redis://127.0.0.1:1/0").publish([])


def test_priority_classes_cover_every_priority_once() -> None:
    covered = [priority for priorities in PRIORITY_CLASSES for priority in priorities]
    assert sorted(covered) == list(range(-1000, 1001))


def test_each_priority_class_has_its_own_redis_list(queue: Queue, redis_url: str) -> None:
    queue.publish([message(n, priority=p) for n, p in enumerate((1000, 1, 0, -1, -1000))])
    with redis.Redis.from_url(redis_url) as client:
        lists = {key.decode(): client.llen(key) for key in client.keys("inpaint.*")}
    assert sorted(lists.values()) == [1, 2, 2]
    assert lists[queue_name(ENGINE)] == 2  # the highest class has the name without a suffix


def test_a_message_is_about_a_kilobyte(queue: Queue, redis_url: str) -> None:
    queue.publish([message(2**40, attempt=3)])
    with redis.Redis.from_url(redis_url) as client:
        (raw,) = client.lrange(f"{queue_name(ENGINE)}\x06\x163", 0, -1)
    assert len(raw) < 1024
    assert json.loads(raw)["headers"]["task"] == TASK


def test_celery_reads_our_messages_in_order_of_priority_and_publication(
    queue: Queue, redis_url: str
) -> None:
    queue.publish([message(1), message(2), message(3, priority=5), message(4, priority=-5)])
    app = celery_app(redis_url, [ENGINE])
    bodies = []
    with app.connection_for_read() as connection:
        consumed = connection.SimpleQueue(app.amqp.queues[queue_name(ENGINE)])
        for _ in range(4):
            delivered = consumed.get(timeout=5)
            bodies.append(delivered.payload)
            assert delivered.headers["task"] == TASK
            assert delivered.headers["id"] == f"{delivered.payload[0][0]}-0"
            delivered.ack()
        consumed.close()
    assert [body[0] for body in bodies] == [[n, 0, False] for n in (3, 1, 2, 4)]
    assert queue.length(ENGINE) == 0


def test_messages_of_other_tasks_are_ignored(queue: Queue, redis_url: str) -> None:
    app = celery_app(redis_url)
    app.send_task("another.task", queue=queue_name(ENGINE))
    queue.publish([message(1)])
    assert queue.ready_messages(ENGINE) == {(1, 0)}
    app.close()


def test_celery_is_configured_for_leases_and_json() -> None:
    conf = celery_app("redis://host/0", ["sd2", ENGINE]).conf
    assert conf.accept_content == ["json"]
    assert conf.task_acks_late
    assert conf.task_ignore_result
    assert not conf.task_reject_on_worker_lost
    assert conf.worker_prefetch_multiplier == 1
    assert conf.result_backend is None
    assert conf.broker_connection_retry_on_startup
    assert conf.broker_connection_max_retries is None
    assert [queue.name for queue in conf.task_queues] == ["inpaint.sd2", "inpaint.opencv"]


def test_an_unreachable_redis_is_a_one_line_error_without_its_password(
    own_redis: servers.Redis,
) -> None:
    queue = Queue(own_redis.url.replace("//", "//:hush@"))
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("requirepass", "hush")
    queue.publish([message(1)])
    own_redis.kill()
    with pytest.raises(BrokerUnavailable) as caught:
        queue.publish([message(2)])
    assert caught.value.retryable
    assert "hush" not in f"{caught.value} {queue}"
    assert "\n" not in str(caught.value)
    own_redis.start()  # without the password, which Redis then ignores
    plain = Queue(own_redis.url)
    plain.publish([message(2)])
    assert plain.ready_messages(ENGINE) == {(1, 0), (2, 0)}
    assert plain.ping()
    for connected in (queue, plain):
        connected.close()


def test_a_queue_reconnects_after_redis_was_restarted(own_redis: servers.Redis) -> None:
    queue = Queue(own_redis.url)
    queue.publish([message(1)])
    own_redis.kill()
    with pytest.raises(BrokerUnavailable):
        queue.length(ENGINE)
    own_redis.start()
    queue.publish([message(2)])
    assert queue.ready_messages(ENGINE) == {(1, 0), (2, 0)}
    queue.close()


def test_a_queue_is_printed_as_its_url_without_the_password() -> None:
    assert str(Queue("redis://host:6379/0")) == "redis://host:6379/0"
    assert str(Queue("redis://user:hush@host:6379/0")) == "redis://user:**@host:6379/0"
    assert str(Queue("redis+socket:///run/redis.sock")) == "redis+socket:///run/redis.sock"
