// OpenAI's SDK for Node writes a whole answer to a file, and reads a streamed one piece by piece.
// Arguments: the service's URL, the text, and the file to write. It runs in a folder that has the package.
import { createWriteStream } from "node:fs";
import { writeFile } from "node:fs/promises";
import OpenAI from "openai";

const [url, input, file] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const request = { model: "tts-1", voice: "alloy", input };

const whole = await client.audio.speech.create(request);
await writeFile(`${file}.mp3`, Buffer.from(await whole.arrayBuffer()));

const streamed = await client.audio.speech.create({ ...request, response_format: "pcm" });
const out = createWriteStream(`${file}.pcm`);
let pieces = 0;
for await (const piece of streamed.body) {
  pieces += 1;
  out.write(piece);
}
await new Promise((done) => out.end(done));

let error;
try {
  await client.audio.speech.create({ ...request, voice: "nobody" });
} catch (caught) {
  error = { kind: caught.constructor.name, code: caught.code, param: caught.param };
}
console.log(JSON.stringify({ pieces, error, models: (await client.models.list()).data.length }));
