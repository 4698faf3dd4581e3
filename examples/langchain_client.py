"""Talk to `moac serve` through LangChain; needs langchain-openai, and nothing of moac.

python examples/langchain_client.py http://127.0.0.1:8000/v1
"""

from __future__ import annotations

import argparse
from typing import Literal

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import BaseModel


class River(BaseModel):
    """What is asked for as JSON."""

    continent: Literal["Africa", "America", "Asia", "Europe"]
    longer_than_1000_km: bool


def main() -> None:
    parser = argparse.ArgumentParser(description="Talk to a served package through LangChain.")
    parser.add_argument("url", help="the server's /v1, which `moac serve` tells")
    parser.add_argument("--api-key", default="none", help="where the server asks for one")
    options = parser.parse_args()

    with OpenAI(base_url=options.url, api_key=options.api_key) as client:
        name = client.models.list().data[0].id
    model = ChatOpenAI(
        model=name, base_url=options.url, api_key=options.api_key, temperature=0, max_tokens=60
    )

    turns = [SystemMessage("You are brief."), HumanMessage("Name a river.")]
    answer = model.invoke(turns)
    print(f"answer: {answer.content}")

    turns += [AIMessage(answer.content), HumanMessage("Name another one.")]
    pieces = list(model.stream(turns, stream_usage=True))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    print(f"streamed in {len(pieces)} pieces: {whole.content}")
    usage = whole.usage_metadata
    print(f"{usage['input_token_details']['cache_read']} of {usage['input_tokens']} tokens reused")

    river = model.with_structured_output(River, method="json_schema").invoke("What is the Nile?")
    print(f"as JSON: {river!r}")


if __name__ == "__main__":
    main()
