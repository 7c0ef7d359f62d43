// The nodes' texts in the user's language, through documented hooks.
//
// The server hands them out at /i18n (from locales/), and the frontend should use them by itself. Some frontends, that of
// ComfyUI 0.3.75 among them, read /i18n first and load the language afterwards, which drops the texts of every pack in any
// language but English. Where the frontend does use them, this sets the same texts again.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const OURS = /^(Sophgo|Ascend)[A-Z]/;

let nodes = {};
let categories = {};

app.registerExtension({
  name: "SophgoAscend.Texts",

  async init() {
    const locale = app.ui.settings.getSettingValue("Comfy.Locale");
    try {
      const texts = (await (await api.fetchApi("/i18n")).json())[locale] ?? {};
      nodes = texts.nodeDefs ?? {};
      categories = texts.nodeCategories ?? {};
    } catch (error) {
      console.warn("Sophgo & Ascend: no translated texts", error);
    }
  },

  beforeRegisterNodeDef(nodeType, definition) {
    const texts = textsOf(definition.name);
    if (!texts) return;
    definition.display_name = texts.display_name ?? definition.display_name;
    definition.description = texts.description ?? definition.description;
    definition.category = definition.category.split("/").map((part) => categories[part] ?? part).join("/");
    const inputs = { ...definition.input?.required, ...definition.input?.optional };
    for (const [name, [, options]] of Object.entries(inputs))
      if (options && texts.inputs?.[name]?.tooltip) options.tooltip = texts.inputs[name].tooltip;
    definition.output_tooltips = definition.output_tooltips?.map((tooltip, index) => texts.outputs?.[index]?.tooltip ?? tooltip);
  },

  nodeCreated(node) {
    const texts = textsOf(node.comfyClass);
    if (!texts) return;
    for (const input of node.inputs ?? []) input.localized_name = texts.inputs?.[input.name]?.name ?? input.localized_name;
    for (const widget of node.widgets ?? []) widget.label = texts.inputs?.[widget.name]?.name ?? widget.label;
    node.outputs?.forEach((output, index) => {
      // An output that is only called by its type has a translation of its own.
      if (output.name !== output.type) output.localized_name = texts.outputs?.[index]?.name ?? output.localized_name;
    });
  },
});

function textsOf(id) {
  return OURS.test(id ?? "") ? nodes[id] : undefined;
}
