// Starts Swagger UI on this server's own description, and shows a stream while it comes:
// Swagger UI itself shows an answer only once it is whole.
"use strict";

const live = document.getElementById("live");
const [title, text] = [live.querySelector("b"), live.querySelector("pre")];
live.querySelector("button").addEventListener("click", () => { live.hidden = true; });

function take(texts, data) {
  if (data.error) texts.push(`[${data.error.message}]`);
  for (const choice of data.choices || []) {
    const more = choice.delta ? choice.delta.content : choice.text;
    texts[choice.index] = (texts[choice.index] || "") + (more || "");
  }
}

async function show(body) {
  live.hidden = false;
  title.textContent = "The answer, as it comes";
  text.textContent = "";
  const texts = [];
  let rest = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) take(texts, JSON.parse(line.slice(6)));
      if (line === "data: [DONE]") title.textContent = "The whole answer";
    }
    text.textContent = texts.join("\n\n");
    text.scrollTop = text.scrollHeight;
  }
}

async function watched(...request) {
  const response = await fetch(...request);
  if ((response.headers.get("content-type") || "").startsWith("text/event-stream")) {
    show(response.clone().body).catch((error) => { title.textContent = `The stream broke: ${error}`; });
  }
  return response;
}

window.ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#page",
  deepLinking: true,
  tryItOutEnabled: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
  docExpansion: "list",
  validatorUrl: null,
  requestInterceptor: (request) => { request.userFetch = watched; return request; },
});
