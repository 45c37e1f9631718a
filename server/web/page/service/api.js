// The service's API: requests with the key, answers as JSON, failures with their words and their field.

import { ask, keys } from "./keys.js";
import { strings } from "../strings.js";

/** The service's own address, whatever path a proxy has put it below. */
const BASE = new URL("../../../", import.meta.url);

/** The whole address of a path such as `v1/models`. */
export function urlOf(path) {
  return new URL(path, BASE).href;
}

/** A refusal: `message` for people, `code` for programs, `field` of the request at fault (or null). */
export class Failure extends Error {
  constructor(message, { status = 0, code = null, field = null, retryAfter = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.field = field;
    this.retryAfter = retryAfter;
  }
}

/** The failure that an answer tells. */
async function failureOf(answer) {
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // A proxy in between may answer with a page of its own.
  }
  const seconds = Number(answer.headers.get("retry-after")) || null;
  return new Failure(error.message || strings.errors.status(answer.status), {
    status: answer.status,
    code: error.code ?? null,
    field: error.param ?? null,
    retryAfter: seconds,
  });
}

function headersFor(kind, given) {
  const key = (kind === "admin" && keys.value.admin) || keys.value.api || keys.value.admin;
  return { ...(key ? { Authorization: `Bearer ${key}` } : {}), ...given };
}

/**
 * The answer of one request, with its body unread. `kind` is the key that it needs: "api" or "admin".
 * A missing or unknown key is asked for, as often as needed. Every other refusal is thrown as a Failure.
 */
export async function send(path, { kind = "api", json, headers = {}, ...options } = {}) {
  const body = json === undefined ? options.body : JSON.stringify(json);
  const type = json === undefined ? {} : { "Content-Type": "application/json" };
  for (;;) {
    let answer;
    try {
      answer = await fetch(urlOf(path), { ...options, body, headers: headersFor(kind, { ...type, ...headers }) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Failure(strings.errors.unreachable);
    }
    if (answer.ok) return answer;
    const failure = await failureOf(answer);
    const refused = failure.code === "invalid_api_key" || failure.code === "insufficient_permissions";
    if (!refused || !(await ask(kind, sentWith(kind) ? failure.message : ""))) throw failure;
  }
}

function sentWith(kind) {
  return "Authorization" in headersFor(kind, {});
}

/** The JSON of one request. */
export async function getJson(path, options = {}) {
  return (await send(path, { headers: { Accept: "application/json" }, ...options })).json();
}
