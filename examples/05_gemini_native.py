"""Gemini's own wire as a row of your own. You will see an answer; it takes GEMINI_API_KEY."""

from ember import Provider, Reply, Request, ToolCall, Usage, model


def encode(ask: Request) -> dict:  # tools, and messages that have "parts", in Gemini's own form
    turns = [{"role": m["role"].replace("assistant", "model"),
              "parts": m.get("parts") or [{"text": m["content"]}]} for m in ask.messages]
    body = {"systemInstruction": turns.pop(0)} if turns[0]["role"] == "system" else {}
    config = {"temperature": ask.temperature, "maxOutputTokens": ask.max_tokens, "seed": ask.seed,
              "stopSequences": ask.stop, "responseJsonSchema": ask.schema,
              "responseMimeType": "application/json" if ask.schema else "text/plain"}
    return body | {"contents": turns, "tools": ask.tools, "generationConfig": config} | ask.options

def decode(raw: dict) -> Reply:  # a blocked prompt has no candidates; thoughts count as output
    ends = raw.get("candidates") or [{"finishReason": raw["promptFeedback"]["blockReason"]}]
    said = [part for end in ends for part in end.get("content", {}).get("parts", [])]
    text = "".join(part.get("text", "") for part in said if not part.get("thought"))
    calls = tuple(ToolCall(call.get("id", ""), call["name"], call.get("args", {}))
                  for part in said if (call := part.get("functionCall")))
    prompt, tool, out, hidden, cached = (raw.get("usageMetadata", {}).get(f"{kind}TokenCount", 0)
        for kind in ("prompt", "toolUsePrompt", "candidates", "thoughts", "cachedContent"))
    return Reply(text, text, Usage(prompt + tool, out + hidden, cached, hidden), tool_calls=calls,
        finish=ends[-1].get("finishReason"), raw=raw, message={"role": "model", "parts": said})

def decode_event(body: dict, event: dict) -> str:  # each event is a whole answer with a new part
    body |= event | {"candidates": body.get("candidates", []) + event.get("candidates", [])}
    return decode({"candidates": [{}]} | event).text

GEMINI = Provider(
    "google", "https://generativelanguage.googleapis.com/v1beta/models", encode, decode,
    decode_event, ("GEMINI_API_KEY",), headers=(("x-goog-api-key", "{key}"),), embed_path="",
    path="/{model}:generateContent", stream_path="/{model}:streamGenerateContent?alt=sse")

async def main() -> None:
    print(await model("gemini-2.5-flash", provider=GEMINI)("Why is the sky blue?"))

if __name__ == "__main__":
    import asyncio
    asyncio.run(main())
