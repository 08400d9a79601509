"""What clients with open connections see of a server that is told to stop."""

import signal
import threading
import time

import httpx

from tests.support.server import ServerProcess

LONG = {"text_input": "Once upon a time", "parameters": {"max_tokens": 200, "ignore_eos": True}}
SHORT = {"text_input": "Once upon a time", "parameters": {"max_tokens": 1}}


def test_answers_of_a_draining_server_end_their_connection_and_it_waits_for_those_between_two_requests() -> None:
    with ServerProcess(max_model_len=512) as server:
        server.wait_until_ready()
        url = f"http://127.0.0.1:{server.port}"
        with httpx.Client(base_url=url, timeout=60) as streaming, httpx.Client(base_url=url, timeout=60) as asking:
            assert asking.post("/v2/models/demo/generate", json=SHORT).headers.get("connection") != "close"
            refused: list[httpx.Response] = []

            def ask_again() -> None:
                server.send_signal(signal.SIGTERM)
                server.wait_for_log("draining")
                refused.append(asking.post("/v2/models/demo/generate", json=SHORT))

            with streaming.stream("POST", "/v2/models/demo/generate_stream", json=LONG) as answer:
                lines = answer.iter_lines()
                next(lines)
                other = threading.Thread(target=ask_again)
                other.start()
                last = [line for line in lines if line][-1]
            other.join()
            assert '"finish_reason":"length"' in last
            assert (refused[0].status_code, refused[0].headers["connection"]) == (503, "close")
            assert server.wait() == 0


def test_an_idle_server_without_connections_is_gone_at_once() -> None:
    with ServerProcess() as server:
        server.wait_until_ready()
        server.client.close()
        time.sleep(0.1)
        server.send_signal(signal.SIGTERM)
        assert server.wait() == 0
