// Pictures in the browser: fitted to the size of the request, with a mask.

/** Return a PNG of a picture that covers the size, with its centre in the centre. */
export async function fitted(blob, width, height) {
  const bitmap = await createImageBitmap(blob);
  const layer = new OffscreenCanvas(width, height);
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [wide, high] = [bitmap.width * scale, bitmap.height * scale];
  const context = layer.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#fff"; // behind transparent parts
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, (width - wide) / 2, (height - high) / 2, wide, high);
  bitmap.close();
  return layer.convertToBlob({ type: "image/png" });
}

/** Return the width and height of a picture in pixels. */
export async function sizeOf(blob) {
  const bitmap = await createImageBitmap(blob);
  const { width, height } = bitmap;
  bitmap.close();
  return { width, height };
}

/** Return the base64 data of a blob. */
export async function base64(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}

/** Return a Blob of base64 data. */
export function decoded(text, type) {
  return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type });
}

/** Return a mask that is transparent where this one is white: that is how OpenAI marks it. */
export async function holes(mask) {
  const bitmap = await createImageBitmap(mask);
  const layer = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = layer.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, bitmap.width, bitmap.height);
  for (let place = 0; place < pixels.data.length; place += 4) {
    pixels.data[place + 3] = pixels.data[place] >= 128 ? 0 : 255;
  }
  context.putImageData(pixels, 0, 0);
  return layer.convertToBlob({ type: "image/png" });
}
