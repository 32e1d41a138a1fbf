"use strict";

const field = (id) => document.getElementById(id);
let running = null;

function headers() {
  const key = field("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function listModels() {
  const response = await fetch("v1/models", { headers: headers() });
  const body = await response.json();
  if (!response.ok) throw new Error(body.error.message);
  field("model").replaceChildren(...body.data.map((model) => new Option(model.id)));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) yield part.replace(/^data: /, "");
  }
}

async function generate() {
  if (!field("model").value) await listModels();
  const isChat = field("kind").value === "chat";
  const prompt = field("prompt").value;
  const start = performance.now();
  let count = 0;
  field("text").textContent = isChat ? "" : prompt;
  const response = await fetch(isChat ? "v1/chat/completions" : "v1/completions", {
    method: "POST",
    headers: headers(),
    signal: running.signal,
    body: JSON.stringify({
      model: field("model").value,
      ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      max_tokens: Number(field("tokens").value),
      temperature: Number(field("temperature").value),
      top_p: Number(field("top_p").value),
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const event of events(response)) {
    if (event === "[DONE]") break;
    const body = JSON.parse(event);
    if (body.error) throw new Error(body.error.message);
    for (const choice of body.choices) {
      field("text").textContent += choice.text ?? choice.delta.content ?? "";
    }
    count = body.usage?.completion_tokens ?? count;
  }
  const seconds = (performance.now() - start) / 1000;
  field("status").textContent = `${count} tokens in ${seconds.toFixed(1)} s`;
}

document.querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  running = new AbortController();
  field("go").disabled = true;
  field("stop").disabled = false;
  field("status").textContent = "Generating …";
  try {
    await generate();
  } catch (error) {
    field("status").textContent = error.name === "AbortError" ? "Stopped" : error.message;
  }
  field("go").disabled = false;
  field("stop").disabled = true;
});
field("stop").addEventListener("click", () => running.abort());
listModels().catch((error) => { field("status").textContent = error.message; });
