"""Which version answers whom while a release is under way, through HTTP."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from app.api.answers import Reply
from app.api.predictions import PredictOperation
from app.canary.table import ExposureTable
from app.predictor import Predictor
from app.release.store import open_tables
from app.routing_key import Lots
from loadtests.fault_proxy import FaultProxy, Refuse
from tests.canary.conftest import ONE, Releasing, releasing
from tests.tiny_models import contract, write_contract, write_model
from tests.topologies import PASSWORD, server

CHAMPION, CANARY, PREVIOUS = ("2", "champion"), ("1", "canary"), ("2", "previous")
KEYS = [f"user {n}" for n in range(60)]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for _ in range(2):
        asyncio.run(write_model(folder / "models", "m", "binary"))
    return folder


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """Two versions, of which a test may change the model.yaml."""
    shutil.copytree(published / "models", tmp_path / "models")
    return tmp_path


@pytest.fixture
async def service(folder: Path) -> AsyncIterator[Releasing]:
    async with releasing(folder) as serving:
        yield serving


def drawn(service: Releasing, share: float, *keys: str) -> list[tuple[str, str]]:
    """Where each key leads."""
    assert service.rollout is not None
    lots = Lots("canary", "m", service.candidate.id.sha256, str(service.rollout.began))
    return [CANARY if lots.draw(key)[0] < share else CHAMPION for key in keys]


async def test_without_a_release_the_champion_answers(service: Releasing) -> None:
    assert set(await service.answers(*KEYS[:5])) == {CHAMPION}
    assert service.canary.report() is None
    assert "hikyaku_canary_requests_total{" not in await service.metrics()


async def test_a_key_is_answered_where_it_leads_and_stays_there(service: Releasing) -> None:
    service.begin(0.3)
    first = await service.answers(*KEYS)
    assert first == drawn(service, 0.3, *KEYS)
    assert set(first) == {CHAMPION, CANARY}
    assert await service.answers(*KEYS) == first


async def test_who_is_in_at_a_small_share_stays_in_at_a_larger_one(service: Releasing) -> None:
    before: set[str] = set()
    for share in (0.1, 0.3, 0.7, 1.0):
        service.begin(share)
        answers = dict(zip(KEYS, await service.answers(*KEYS), strict=True))
        candidates = {key for key, answer in answers.items() if answer == CANARY}
        assert before <= candidates
        before = candidates
    assert before == set(KEYS)


async def test_workers_agree_and_count_each_key_once(folder: Path) -> None:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(releasing(folder))
        other = await stack.enter_async_context(releasing(folder))
        for worker in (one, other):
            worker.begin(0.5, keys=10)
        assert await one.answers(*KEYS) == await other.answers(*KEYS)
        counted = [await one.counted(), await other.counted()]
        resolved = [each[arm]["resolved"] for each in counted for arm in ("candidate", "against")]
        assert sum(resolved) == len(KEYS)
        assert sum(each["outside"].get("not_first", 0) for each in counted) == len(KEYS)


async def test_a_key_stays_where_it_is_in_workers_that_have_read_another_model_yaml(
    folder: Path,
) -> None:
    answers = []
    for key in ("a", "b"):
        write_contract(folder / "models" / "m", contract("binary", routing_key=key))
        async with releasing(folder) as worker:
            worker.begin(0.5, routing_key="a")
            answers.append([await worker.answer({"a": a, "b": a % 3}) for a in range(20)])
    assert answers[0] == answers[1]


async def test_a_key_may_be_a_field_and_its_first_instance_routes(service: Releasing) -> None:
    service.begin(0.5, routing_key="a")
    for a in range(10):
        [expected] = drawn(service, 0.5, f"{a}.0")
        assert await service.answer({"a": a, "b": 1}, {"a": a, "b": 2}) == expected
        assert await service.answer({"a": a, "b": 1}, {"a": a + 1, "b": 2}) == expected
        [expected] = drawn(service, 0.5, "given")
        assert await service.answer({"a": a, "b": 1}, routing_key="given") == expected
    counted = await service.counted()
    assert counted["outside"] == {"disagree": 10, "not_first": 9}
    assert counted["candidate"]["assigned"] + counted["against"]["assigned"] == 11


async def test_a_request_without_a_key_is_drawn_by_itself(tmp_path: Path) -> None:
    for _ in range(2):
        await write_model(tmp_path / "models", "m", "binary")
    async with releasing(tmp_path) as service:
        service.begin(0.5)
        answers = [await service.answer() for _ in range(40)]
        assert set(answers) == {CHAMPION, CANARY}
        counted = await service.counted()
        assert counted["candidate"]["resolved"] == answers.count(CANARY)
        assert counted["against"]["resolved"] == answers.count(CHAMPION)


async def test_requests_are_answered_once_whatever_the_stage_becomes(service: Releasing) -> None:
    """By a version that may answer: the canary only while there is one."""
    answers: list[tuple[str, str]] = []

    async def ask(number: int) -> None:
        answers.append(await service.answer(routing_key=f"user {number}"))

    asked = 0
    async with asyncio.TaskGroup() as asking:
        for turn in range(60):
            if turn % 4 == 3:
                service.canary.follow(None, None, None)
            else:
                service.begin((0.1, 0.5, 1.0)[turn % 4], stage_began=4 + turn)
            for _ in range(5):
                asking.create_task(ask(asked))
                asked += 1
            await asyncio.sleep(0)
    assert len(answers) == asked == 300
    assert set(answers) == {CHAMPION, CANARY}
    service.canary.follow(None, None, None)
    assert set(await service.answers(*KEYS)) == {CHAMPION}
    async with asyncio.timeout(1):
        await asyncio.gather(service.candidate.uses.ended(), service.champion.uses.ended())


async def test_an_operator_may_say_who_answers_and_that_is_no_evidence(service: Releasing) -> None:
    service.begin(0.5)
    for key in KEYS[:10]:
        assert await service.answer(routing_key=key, hikyaku_route="canary") == CANARY
        assert await service.answer(routing_key=key, hikyaku_route="champion") == CHAMPION
    counted = await service.counted()
    assert counted["outside"] == {"override": 20}
    assert counted["candidate"]["assigned"] == counted["against"]["assigned"] == 0


@pytest.mark.parametrize("share", [None, 0.0, 1.0])
async def test_where_no_candidate_answers_nobody_gets_one(
    service: Releasing, share: float | None
) -> None:
    """No release, one that is shown requests only, and one that is the champion already."""
    if share is not None:
        service.begin(share, is_watched=share == 1.0)
    response = await service.ask(hikyaku_route="canary")
    assert (response.status_code, response.json()["error"]["field"]) == (400, "Hikyaku-Route")
    assert (await service.answer(hikyaku_route="champion"))[1] == "champion"


async def test_a_candidate_that_is_not_open_here_cannot_be_asked_for(service: Releasing) -> None:
    rollout = service.begin(0.5)
    service.canary.follow(rollout, None, service.champion)
    response = await service.ask(hikyaku_route="canary")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_ready")
    assert set(await service.answers(*KEYS[:10])) == {CHAMPION}
    counted = await service.counted()
    assert (counted["outside"], counted["misrouted"]) == ({"not_open": 10}, 0)


async def test_only_operators_may_say_who_answers(folder: Path) -> None:
    token = "a-token-of-an-operator"
    async with releasing(folder, HIKYAKU_OPERATOR_TOKEN=token) as service:
        service.begin(0.5)
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer another-token-of-nobody"}, 403),
            ({"authorization": f"Bearer {token}"}, 200),
        ):
            response = await service.ask(hikyaku_route="canary", **headers)
            assert response.status_code == status
        response = await service.ask(hikyaku_route="both", authorization=f"Bearer {token}")
        assert response.status_code == 400
        assert (await service.ask()).status_code == 200


async def test_held_out_keys_never_get_a_candidate(service: Releasing) -> None:
    """The same keys in every release."""
    service.begin(1.0, hold_out=0.5)
    answers = await service.answers(*KEYS)
    held = answers.count(CHAMPION)
    assert 10 < held < 50
    counted = await service.counted()
    assert (counted["outside"], counted["against"]["assigned"]) == ({"hold_out": held}, 0)
    assert counted["candidate"]["assigned"] == answers.count(CANARY)
    service.begin(1.0, hold_out=0.5, began=8, stage_began=9)
    assert await service.answers(*KEYS) == answers


async def test_while_the_candidate_is_watched_some_keys_get_the_version_before(
    service: Releasing,
) -> None:
    rollout = service.begin(0.5, is_watched=True)
    # What was the candidate is the champion now.
    service.runtime.models["m"] = service.candidate
    service.canary.follow(rollout, service.candidate, service.champion)
    answers = await service.answers(*KEYS)
    assert set(answers) == {("1", "champion"), PREVIOUS}
    counted = await service.counted()
    assert counted["candidate"]["resolved"] == answers.count(("1", "champion"))
    assert counted["against"]["resolved"] == answers.count(PREVIOUS)
    service.runtime.models["m"] = service.champion


async def test_while_it_is_shown_requests_only_latencies_are_counted(service: Releasing) -> None:
    service.begin(0.0)
    assert set(await service.answers(*KEYS)) == {CHAMPION}
    counted = await service.counted()
    assert counted["against"]["assigned"] == counted["blocks"] == 0
    assert 0 < counted["against"]["p50_s"] <= counted["against"]["p99_s"] < 10


async def test_what_only_the_candidate_refuses_is_its_error(folder: Path) -> None:
    async with releasing(folder) as service:
        # The candidate is opened by a model.yaml that was changed meanwhile.
        stricter = contract("binary", limits={"max_instances": 1})
        write_contract(folder / "models" / "m", stricter)
        opened = await service.runtime.reload.followed["m"].residents.open(1)
        service.candidate = opened.model
        service.begin(0.5)
        statuses = [(await service.ask(ONE, ONE, routing_key=key)).status_code for key in KEYS[:20]]
        expected = [413 if to == CANARY else 200 for to in drawn(service, 0.5, *KEYS[:20])]
        assert statuses == expected
        counted = await service.counted()
        assert counted["candidate"]["errors"] == statuses.count(413)
        assert counted["against"]["errors"] == 0


async def test_who_leaves_at_once_is_no_error(service: Releasing) -> None:
    service.begin(0.5)
    runtime = service.runtime
    operation = PredictOperation(
        Predictor(runtime.models, runtime.clock), runtime.metrics, canaries=runtime.canaries
    )
    replies: list[Reply] = []
    for key in KEYS[:8]:
        headers = {b"routing-key": key.encode()}
        call = operation.open("m", headers, asyncio.get_running_loop().time(), "", replies.append)
        assert call is not None
        call.begin(json.dumps({"instances": [ONE]}).encode())
        call.leave()
    counted = await service.counted()
    assert replies == []
    assert counted["candidate"]["resolved"] + counted["against"]["resolved"] == 8
    assert counted["candidate"]["errors"] == counted["against"]["errors"] == 0


async def test_what_each_route_answers_is_told_apart(service: Releasing) -> None:
    service.begin(0.5)
    answers = await service.answers(*KEYS)
    await service.counted()
    metrics = await service.metrics()
    for route, answer, arm in (
        ("champion", CHAMPION, "against"),
        ("canary", CANARY, "candidate"),
    ):
        count = f"{float(answers.count(answer))}"
        for series in (
            f'hikyaku_canary_requests_total{{model="m",outcome="ok",route="{route}"}}',
            f'hikyaku_canary_exposures_total{{arm="{arm}",model="m",outcome="ok"}}',
            f'hikyaku_canary_request_duration_seconds_count{{model="m",route="{route}"}}',
            f'hikyaku_prediction_count{{model="m",output="probability",role="{route}"}}',
        ):
            assert f"{series} {count}" in metrics
    assert 'hikyaku_canary_share{model="m"} 0.5' in metrics


async def test_a_lost_redis_loses_evidence_and_no_request(folder: Path, tmp_path: Path) -> None:
    with server(tmp_path / "redis", "appendonly yes") as redis:
        async with FaultProxy(redis.port) as proxy:
            url = f"redis://:{PASSWORD}@127.0.0.1:{proxy.port}"
            async with releasing(folder, STATE_REDIS_URL=url) as service:
                service.begin(0.5)
                await service.answers(*KEYS[:20])
                before = await service.counted()
                await proxy.switch(Refuse())
                answers = await service.answers(*KEYS)
                assert answers == drawn(service, 0.5, *KEYS)
                after = await service.counted()
                assert after["outside"] == {"not_first": 20, "unavailable": 40}
                assert after["candidate"]["resolved"] == before["candidate"]["resolved"] > 0


async def test_what_is_counted_outlives_the_worker(folder: Path) -> None:
    async with releasing(folder) as service:
        service.begin(0.5, keys=10)
        answers = await service.answers(*KEYS)
    state = next((folder / "work" / "state").iterdir())
    async with open_tables(None, state, "reader", {}, lambda kind: None) as tables:
        stored = await tables.read("canary:m:")
    assert stored.keys() == {"canary:m:4"}
    [content] = stored["canary:m:4"].contents
    table = ExposureTable.decode(content)
    assert table.candidate.resolved == answers.count(CANARY)
    assert table.against.resolved == answers.count(CHAMPION)
    assert table.errors == {(0, 0): len(KEYS) // 10}
    assert sum(table.candidate.latencies.values()) == answers.count(CANARY)
