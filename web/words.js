// Our own words in the page's language: translations that ComfyUI serves from locales/, or else English.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const translations = await api.getCustomNodesI18n().catch(() => ({}));

/** An English text in the language that is set now, with `values` in place of what stands in braces. */
export function t(text, values = {}) {
  const language = app.extensionManager.setting.get("Comfy.Locale");
  const told = translations[language]?.difflens?.[text] ?? text;
  return told.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}
