"""`helm test`: asks the release a question until it answers. Arguments: URL, model, prompt, seconds.

Runs from a string in the release's own image, with the standard library alone.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import quote


def ask(url: str, model: str, prompt: str, seconds: float) -> str:
    """The model's answer; raises OSError if the server is out of reach and ValueError for an answer without text.

    Of a model that pools, what it is and how many numbers: `embedding [1, 384]`.
    """
    path = f"{url}/v2/models/{quote(model, safe='')}"
    outputs = [output["name"] for output in call(path, None, seconds)["outputs"]]
    if "text_output" in outputs:
        text = call(f"{path}/generate", {"text_input": prompt, "parameters": {"max_tokens": 16}}, seconds)[
            "text_output"
        ]
    else:
        tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": [prompt]}
        output = call(f"{path}/infer", {"inputs": [tensor]}, seconds)["outputs"][0]
        text = f"{output['name']} {output['shape']}" if output["data"] else ""
    if not text:
        raise ValueError("the answer is empty")
    return text


def call(url: str, content: dict | None, seconds: float) -> dict:
    """What the server answers: to GET without `content`, else to POST."""
    headers = {"Content-Type": "application/json"}
    if key := first_key(os.environ.get("API_KEYS", "")):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, None if content is None else json.dumps(content).encode(), headers)
    context = ssl.create_default_context()
    context.check_hostname = False  # the certificate is the cluster's own affair, as for the kubelet's probes
    context.verify_mode = ssl.CERT_NONE
    with urllib.request.urlopen(request, timeout=seconds, context=context) as response:
        return json.load(response)


def first_key(text: str) -> str:
    """The first key of a Secret with one a line; empty where it has none that could be sent: records, or hashes."""
    words = [word.strip() for line in text.splitlines() if line.lstrip()[:1] != "#" for word in line.split(",")]
    plain = [word for word in words if word and not word.startswith(("sha256:", "-", "{", "[")) and " " not in word]
    return plain[0] if plain and not text.lstrip().startswith(("-", "{", "[", "keys:")) else ""


def main() -> int:
    """Ask until there is an answer or the time is over; the exit status."""
    url, model, prompt, seconds = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            print(f"{prompt!r} -> {ask(url, model, prompt, max(left, 1.0))!r}")
            return 0
        except urllib.error.HTTPError as error:
            reason, is_final = f"{error.code}: {error.read().decode(errors='replace')}", error.code < 500
        except (OSError, KeyError, ValueError) as error:
            reason, is_final = repr(error), False
        print(f"{url}: {reason}", file=sys.stderr)
        if is_final or left <= 2:
            return 1
        time.sleep(2)


if __name__ == "__main__":
    sys.exit(main())
