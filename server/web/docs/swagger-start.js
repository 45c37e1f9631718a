// The document lies beside /docs, whatever path a proxy shows this server below.
const openapi = new URL("../../openapi.json", document.currentScript.src).href;

// Swagger UI's player would fetch the response's URL again, with GET. It gets the audio that has come instead,
// with a link to save it: the player knows neither pcm nor G.711.
const urls = new WeakMap();
function urlOf(audio) {
  if (!urls.has(audio)) urls.set(audio, URL.createObjectURL(audio));
  return urls.get(audio);
}
const endings = { "audio/mpeg": "mp3", "audio/basic": "ulaw", "audio/x-alaw-basic": "alaw" };
const playWhatHasCome = () => ({
  wrapComponents: {
    responseBody: (ResponseBody, { React }) => (properties) => {
      const { content, contentType } = properties;
      if (!(content instanceof Blob && /^audio\//i.test(contentType)))
        return React.createElement(ResponseBody, properties);
      const url = urlOf(content);
      const type = contentType.split(";")[0].trim().toLowerCase();
      const name = `speech.${endings[type] ?? type.replace("audio/", "")}`;
      return React.createElement(
        React.Fragment,
        null,
        React.createElement(ResponseBody, { ...properties, url }),
        React.createElement("a", { href: url, download: name, className: "speech-download" }, `Download ${name}`),
      );
    },
  },
});

SwaggerUIBundle({
  url: openapi,
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  plugins: [playWhatHasCome],
});
