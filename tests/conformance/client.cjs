// Calls the server with the OpenAI SDK for Node and with plain fetch. Prints the results as one JSON object.
// Usage: node client.cjs BASE_URL MODEL EMBEDDING_MODEL
const OpenAI = require("openai");

const [url, model, embedder] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "not-needed", maxRetries: 0 });
const question = [{ role: "user", content: "What is the capital of France?" }];

async function refused(ask) {
  try {
    await ask();
  } catch (error) {
    return { name: error.constructor.name, status: error.status, code: error.code, type: error.type, id: error.requestID };
  }
  return null;
}

async function read(body) {
  const response = await fetch(`${url}/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return { status: response.status, type: response.headers.get("content-type"), text };
    text += decoder.decode(value, { stream: true });
  }
}

async function main() {
  const found = {};
  const whole = await client.chat.completions.create({ model, messages: question, temperature: 0 });
  found.whole = whole.choices[0].message.content;
  found.usage = whole.usage;

  found.streamed = "";
  const stream = await client.chat.completions.create({
    model, messages: question, temperature: 0, stream: true, stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    found.streamed += chunk.choices[0]?.delta?.content ?? "";
    if (chunk.usage) found.streamUsage = chunk.usage;
  }

  const runner = client.chat.completions.stream({ model, messages: question, temperature: 0 });
  found.helper = await runner.finalContent();

  const completion = await client.completions.create({ model, prompt: "The quick brown fox", max_tokens: 50, temperature: 0 });
  found.completion = completion.choices[0].text;

  found.models = [];
  for await (const card of client.models.list()) found.models.push(card.id);
  found.card = (await client.models.retrieve(model)).object;

  const plain = await client.embeddings.create({ model: embedder, input: ["Hello world", "Bye"], encoding_format: "float" });
  const packed = await client.embeddings.create({ model: embedder, input: ["Hello world", "Bye"] });
  found.dimensions = plain.data[0].embedding.length;
  found.difference = Math.max(...plain.data[0].embedding.map((x, i) => Math.abs(x - packed.data[0].embedding[i])));

  found.unknown = await refused(() => client.chat.completions.create({ model: "no-such-model", messages: question }));
  found.wrong = await refused(() => client.chat.completions.create({ model, messages: [] }));

  // disconnects in the middle of a stream
  const left = await client.chat.completions.create({ model, messages: [{ role: "user", content: "Tell me a story." }], stream: true });
  for await (const _ of left) break;

  found.fetch = await read({ model, messages: question, temperature: 0, stream: true });
  console.log(JSON.stringify(found));
}

main();
