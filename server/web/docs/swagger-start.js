// The document lies beside /docs, whatever path a proxy shows this server below.
const openapi = new URL("../../openapi.json", document.currentScript.src).href;

// Swagger UI's player would fetch the response's URL again, with GET. It gets the audio that has come instead.
const urls = new WeakMap();
function urlOf(audio) {
  if (!urls.has(audio)) urls.set(audio, URL.createObjectURL(audio));
  return urls.get(audio);
}
const playWhatHasCome = () => ({
  wrapComponents: {
    responseBody: (ResponseBody, { React }) => (properties) => {
      const { content, contentType } = properties;
      const isAudio = content instanceof Blob && /^audio\//i.test(contentType);
      return React.createElement(ResponseBody, isAudio ? { ...properties, url: urlOf(content) } : properties);
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
