// "Copy as": the request of a speech as a program that a person can run.

import { urlOf } from "../service/api.js";
import { service } from "../service/catalog.js";
import { copy } from "../components/files.js";
import { Icon } from "../components/icons.js";
import { strings } from "../strings.js";
import { html, useState } from "../ui.js";

const KNOWN_TO_SDK = ["model", "input", "voice", "instructions", "response_format", "speed"];

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function python(value) {
  return JSON.stringify(value);
}

/** The request as `language`: "curl", "python" or "javascript". */
function programOf(request, language) {
  const key = service.value?.requires.key;
  const file = `speech.${request.response_format}`;
  if (language === "curl") {
    const lines = [
      `curl ${urlOf("v1/audio/speech")}`,
      ...(key ? ['-H "Authorization: Bearer $TTS_API_KEY"'] : []),
      "-H 'Content-Type: application/json'",
      `-d ${quoted(JSON.stringify(request))}`,
      `-o ${file}`,
    ];
    return lines.join(" \\\n  ");
  }
  if (language === "python") {
    const entries = Object.entries(request);
    const named = entries.filter(([name]) => KNOWN_TO_SDK.includes(name)).map(([name, value]) => `    ${name}=${python(value)},`);
    if (!request.voice) named.push('    voice="default",');
    const extra = entries.filter(([name]) => !KNOWN_TO_SDK.includes(name)).map(([name, value]) => `${python(name)}: ${python(value)}`);
    if (extra.length) named.push(`    extra_body={${extra.join(", ")}},`);
    return [
      ...(key ? ["import os", ""] : []),
      "from openai import OpenAI",
      "",
      `client = OpenAI(base_url=${python(urlOf("v1"))}, api_key=${key ? 'os.environ["TTS_API_KEY"]' : '"none"'})`,
      "with client.audio.speech.with_streaming_response.create(",
      ...named,
      ") as speech:",
      `    speech.stream_to_file(${python(file)})`,
    ].join("\n");
  }
  const headers = [...(key ? ["Authorization: `Bearer ${process.env.TTS_API_KEY}`"] : []), '"Content-Type": "application/json"'];
  return [
    'import { writeFile } from "node:fs/promises";',
    "",
    `const answer = await fetch(${JSON.stringify(urlOf("v1/audio/speech"))}, {`,
    '  method: "POST",',
    `  headers: { ${headers.join(", ")} },`,
    `  body: JSON.stringify(${JSON.stringify(request, null, 2).replaceAll("\n", "\n  ")}),`,
    "});",
    "if (!answer.ok) throw new Error(await answer.text());",
    `await writeFile(${JSON.stringify(file)}, Buffer.from(await answer.arrayBuffer()));`,
  ].join("\n");
}

export function CopyAs({ request }) {
  const [copied, setCopied] = useState("");
  const put = async (language) => {
    if (await copy(programOf(request, language))) {
      setCopied(language);
      setTimeout(() => setCopied(""), 2000);
    }
  };
  return html`<span class="copy-as" role="group" aria-label=${strings.player.copyAs}>
    <span class="soft small"><${Icon} name="copy" size=${16} /> ${strings.player.copyAs}</span>
    ${["curl", "python", "javascript"].map(
      (language) => html`<button type="button" class="quiet" onClick=${() => put(language)}>
        ${copied === language ? strings.copied : strings.player.languages[language]}
      </button>`,
    )}
    <span class="hidden-label" role="status">${copied && strings.copied}</span>
  </span>`;
}
