// Sending a form: one request at a time, and the words of a refusal by their field.

import { useState } from "../ui.js";

/** The words about a failure, by the field at fault if it is one of `fields`, else under "". */
export function problemsOf(error, fields, words) {
  if (!error) return {};
  const wait = error.retryAfter ? ` ${words.retryIn(error.retryAfter)}` : "";
  return { [fields.includes(error.field) ? error.field : ""]: error.message + wait };
}

/** [problems, busy, submit]: `submit(action)` runs an asynchronous function, and shows how it fails. */
export function useSubmit(fields, words) {
  const [problems, setProblems] = useState({});
  const [busy, setBusy] = useState(false);
  const submit = async (action) => {
    setProblems({});
    setBusy(true);
    try {
      await action();
    } catch (error) {
      setProblems(problemsOf(error, fields, words));
    } finally {
      setBusy(false);
    }
  };
  return [problems, busy, submit];
}
