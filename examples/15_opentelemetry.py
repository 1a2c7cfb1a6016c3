"""Send each attempt as an OpenTelemetry span, by the conventions for generative AI.

You will see the answer, and the span that an exporter of yours would get.
"""

import asyncio

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

from ember import Attempt, models, track

NAMES = {"azure": "azure.ai.openai", "gemini": "gcp.gemini", "watsonx": "ibm.watsonx.ai",
         "mistral": "mistral_ai", "xai": "x_ai"}  # fmt: skip


def span(call: Attempt) -> None:
    """End a span that began when the attempt did, below the span that is current."""
    began, name = int(call.started * 1e9), f"chat {call.model}"
    facts = {"gen_ai.operation.name": "chat", "gen_ai.request.model": call.model,
             "gen_ai.provider.name": NAMES.get(call.provider, call.provider),
             "gen_ai.usage.input_tokens": call.usage.tokens_in,
             "gen_ai.usage.output_tokens": call.usage.tokens_out}  # fmt: skip
    tracer = trace.get_tracer("ember")
    made = tracer.start_span(name, kind=trace.SpanKind.CLIENT, start_time=began, attributes=facts)
    if call.outcome != "ok":
        made.set_attribute("error.type", call.outcome.partition(":")[0])
        made.set_status(trace.StatusCode.ERROR, call.outcome)
    made.end(began + int(call.seconds * 1e9))


async def main() -> None:
    trace.set_tracer_provider(provider := TracerProvider())
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    with trace.get_tracer("mine").start_as_current_span("question"), track(on_call=span):
        print(await models.local("What is the capital of Germany?", temperature=0, max_tokens=50))


if __name__ == "__main__":
    asyncio.run(main())
