// Editor of the demo's page: marks tokens to redraw, and opens an image of the visitor's.
// gradio runs this once per page, with the component's `element` and `props`.

let adding = null; // while the pointer is down: whether its stroke marks or unmarks

const set = changes => { props.value = { ...props.value, ...changes }; };
// A drawing that was stopped gives way to the picture that it started from.
const setMarked = marked => {
  const { picture, whole, status } = props.value;
  const stopped = whole && whole !== picture;
  set({ marked, drawn: false, picture: stopped ? whole : picture, status: stopped ? "" : status });
};
const tokenAt = (x, y) => {
  const token = document.elementFromPoint(x, y)?.closest("[data-token]");
  return token && element.contains(token) ? token : null;
};
const mark = (token, on) => token.setAttribute("aria-pressed", on);
const isMarked = token => token.getAttribute("aria-pressed") === "true";
const marked = () =>
  [...element.querySelectorAll("[data-token][aria-pressed=true]")].map(token => Number(token.dataset.token));

element.addEventListener("pointerdown", event => {
  const token = tokenAt(event.clientX, event.clientY);
  if (!token || event.button !== 0) return;
  adding = !isMarked(token);
  mark(token, adding);
});
element.addEventListener("pointermove", event => {
  // A finger's events all go to the token that it touched first, so the place decides.
  const token = adding === null ? null : tokenAt(event.clientX, event.clientY);
  if (token) mark(token, adding);
});
for (const name of ["pointerup", "pointercancel"]) {
  window.addEventListener(name, () => {
    if (adding === null) return;
    adding = null;
    setMarked(marked());
  });
}

element.addEventListener("click", event => {
  const action = event.target.closest("[data-mark]")?.dataset.mark;
  if (action) {
    const count = action === "all" ? props.value.rows * props.value.columns : 0;
    setMarked(Array.from({ length: count }, (_, token) => token));
    return;
  }
  const token = event.target.closest("[data-token]");
  if (!token || event.detail !== 0) return; // a click of the pointer is a stroke, handled above
  mark(token, !isMarked(token));
  setMarked(marked());
  element.querySelector(`[data-token="${token.dataset.token}"]`)?.focus();
});

element.addEventListener("change", async event => {
  const file = event.target.files?.[0];
  if (!file) return;
  try {
    const picture = await fitted(file);
    set({ picture, whole: picture, marked: [], drawn: false, download: "", status: "" });
  } catch {
    set({ status: "The browser cannot open this file as an image." });
  }
});

// Return an image file as a PNG's data URL, cropped in the middle and scaled to the model's size.
async function fitted(file) {
  const { width, height } = props.value;
  const image = await createImageBitmap(file);
  const scale = Math.max(width / image.width, height / image.height);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // under transparent parts, as far edit does
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  const [w, h] = [image.width * scale, image.height * scale];
  context.drawImage(image, (width - w) / 2, (height - h) / 2, w, h);
  return canvas.toDataURL("image/png");
}
