// A client of nari.speech.v1 in a page: what comes in one socket, when it has closed.
(server) => new Promise((resolve) => {
  const socket = new WebSocket(`${server}/v1/audio/speech/ws`, "nari.speech.v1");
  socket.binaryType = "arraybuffer";
  const heard = { events: [], bytes: 0 };

  socket.addEventListener("message", ({ data }) => {
    if (typeof data !== "string") {
      heard.bytes += data.byteLength;
      return;
    }
    const event = JSON.parse(data);
    heard.events.push(event.type);
    if (event.type === "session.created") {
      socket.send(JSON.stringify({ type: "request.start", voice: "alloy", language: "english" }));
    } else if (event.type === "request.configured") {
      socket.send(JSON.stringify({ type: "input_text.append", sequence: 0, text: "Hello from a page." }));
      socket.send(JSON.stringify({ type: "input_text.end", sequence: 1 }));
    }
  });
  socket.addEventListener("close", ({ code }) => resolve({ ...heard, code, protocol: socket.protocol }));
})
