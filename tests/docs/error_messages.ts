/**
 * The messages of every error in src, read by TypeScript itself: the syntax tree tells what is written, its checker
 * which function a message comes through.
 */
import { isAbsolute, join, relative } from "node:path";
import {
  type Identifier,
  isArrowFunction,
  isAsExpression,
  isBinaryExpression,
  isBindingElement,
  isBlock,
  isCallExpression,
  isClassDeclaration,
  isConditionalExpression,
  isConstructorDeclaration,
  isExportSpecifier,
  isFunctionDeclaration,
  isIdentifier,
  isImportSpecifier,
  isMethodDeclaration,
  isNewExpression,
  isNonNullExpression,
  isNoSubstitutionTemplateLiteral,
  isNumericLiteral,
  isParameterDeclaration,
  isParenthesizedExpression,
  isPropertyAccessExpression,
  isPropertyAssignment,
  isPropertyDeclaration,
  isReturnStatement,
  isStringLiteral,
  isTemplateExpression,
  isTypeReferenceNode,
  isVariableDeclaration,
  type Node,
  type ParameterDeclaration,
  type SourceFile,
  SyntaxKind,
} from "typescript/unstable/ast";
import { API, type Project, SymbolFlags } from "typescript/unstable/async";

/** What stands for a part of a message that is known only as it runs. */
export const GAP = "…";

export interface ErrorSite {
  /** Path from the repository's root, and line from 1. */
  readonly where: string;
  /** Of a text for a bad line of input, which is shown without being thrown, the property's name: `error`. */
  readonly errorClass: string;
  /** Whether `main.ts` calls it a bug: an error of the language's own classes, which nobody describes. */
  readonly isBug: boolean;
  /** The process status. */
  readonly exitCode: number;
  /** What the message can be, with `…` for its values. */
  readonly skeletons: readonly string[];
}

/** A class of errors in src, or one that the language brings. */
interface ErrorClass {
  readonly exitCode: number;
  readonly isBuiltIn: boolean;
  /** The class's own, which makes the message of its parameters. */
  readonly hasConstructor: boolean;
}

const BUILT_IN = ["Error", "RangeError", "TypeError", "SyntaxError", "AggregateError", "DOMException"];
/** Ends the program quietly. */
const NEVER_SHOWN = ["ClosedPipe"];

/**
 * Every place in src that makes an error.
 * @param root the repository's folder
 * @throws at a message that cannot be read: none is left out
 */
export async function errorSites(root: string): Promise<ErrorSite[]> {
  const api = new API({ cwd: root });
  try {
    const config = join(root, "tsconfig.json");
    const project = (await api.updateSnapshot({ openProjects: [config] })).getProject(config);
    if (!project) throw new Error(`There is no project ${config}`);
    return await new Reader(root, project).read();
  } finally {
    await api.close();
  }
}

class Reader {
  readonly #root: string;
  readonly #project: Project;
  readonly #classes = new Map<string, ErrorClass>(
    BUILT_IN.map((name) => [name, { exitCode: 1, isBuiltIn: true, hasConstructor: false }]),
  );
  readonly #references = new Map<Node, Promise<Node[]>>();
  readonly #declarations = new Map<Node, Promise<Node | undefined>>();

  constructor(root: string, project: Project) {
    this.#root = root;
    this.#project = project;
  }

  async read(): Promise<ErrorSite[]> {
    const names = (await this.#project.program.getSourceFileNames()).filter((name) => this.#isSource(name));
    const files = await Promise.all(names.map((name) => this.#project.program.getSourceFile(name)));
    const nodes = files.flatMap((file) => [...descendants(file!)]);
    this.#findClasses(nodes);
    const results = await Promise.allSettled(nodes.map((node) => this.#site(node)));
    const failures = results.filter(({ status }) => status === "rejected") as PromiseRejectedResult[];
    if (failures.length > 0) throw new Error(failures.map(({ reason }) => String(reason)).join("\n"));
    return results.flatMap((result) => result.status === "fulfilled" ? result.value ?? [] : []);
  }

  async #site(node: Node): Promise<ErrorSite | undefined> {
    const made = this.#made(node);
    if (!made) return undefined;
    const { errorClass, message } = made;
    const { exitCode = 1, isBuiltIn = false } = this.#classes.get(errorClass) ?? {};
    const skeletons = await this.#whole(message, errorClass);
    if (skeletons.length === 0) return undefined;
    return { where: this.#where(node), errorClass, isBug: isBuiltIn, exitCode, skeletons };
  }

  #isSource(name: string): boolean {
    const path = relative(join(this.#root, "src"), name);
    return !path.startsWith("..") && !isAbsolute(path) && !path.endsWith(".d.ts");
  }

  /** Classes that extend an error, however far: looks again until no more are found. */
  #findClasses(nodes: readonly Node[]): void {
    const declarations = nodes.filter(isClassDeclaration);
    for (let before = -1; before < this.#classes.size;) {
      before = this.#classes.size;
      for (const { name, heritageClauses, members } of declarations) {
        const bases = heritageClauses?.flatMap(({ types }) => types.map((type) => textOf(type.expression)));
        const base = bases?.map((text) => this.#classes.get(text)).find((found) => found !== undefined);
        if (!base) continue;
        const fields = members.filter(isPropertyDeclaration);
        const own = fields.find((field) => textOf(field.name) === "exitCode")?.initializer;
        this.#classes.set(name!.text, {
          exitCode: own && isNumericLiteral(own) ? Number(own.text) : base.exitCode,
          isBuiltIn: false,
          hasConstructor: name!.text !== "LongformError" && members.some(isConstructorDeclaration),
        });
      }
    }
  }

  /** The class and message of an error that is made here. */
  #made(node: Node): { errorClass: string; message: Node } | undefined {
    if (isNewExpression(node)) {
      const errorClass = textOf(node.expression);
      const found = this.#classes.get(errorClass);
      if (!found && /(?:Error|Exception)$/.test(errorClass)) {
        throw new Error(`${this.#where(node)}: \`${errorClass}\` is no class of src or of the language`);
      }
      // Without a message, or with a system's code, it is for the program itself, which catches it.
      const message = node.arguments?.[0];
      const isOurs = found && message && !found.hasConstructor && !NEVER_SHOWN.includes(errorClass);
      return isOurs && !isGivenCode(node) ? { errorClass, message } : undefined;
    }
    if (isCallExpression(node) && node.expression.kind === SyntaxKind.SuperKeyword) {
      const errorClass = ancestor(node, isClassDeclaration)!.name!.text;
      const message = node.arguments[0];
      return this.#classes.get(errorClass)?.hasConstructor && message ? { errorClass, message } : undefined;
    }
    if (isPropertyAssignment(node) && textOf(node.name) === "error") {
      const message = rewordedText(node.initializer) ?? node.initializer;
      return isText(message) ? { errorClass: "error", message } : undefined;
    }
    if (isCallExpression(node) && textOf(node.expression) === "writeNote") {
      const [message] = node.arguments;
      const isError = message && isTemplateExpression(message) && /^error: ./.test(message.head.text + GAP);
      return isError ? { errorClass: "error", message } : undefined;
    }
    return undefined;
  }

  /** What a message can be; none where it is another error's, which is read where that is made. */
  async #whole(message: Node, errorClass: string): Promise<string[]> {
    if (await this.#isAnother(message)) return [];
    const found = await this.#texts(message, []);
    const skeletons = [...new Set(found?.map(tidy))];
    const unread = skeletons.find((skeleton) => (skeleton.match(/[A-Za-z]+/g) ?? []).length < 2);
    if (found === undefined || unread !== undefined) {
      throw new Error(
        `${this.#where(message)}: cannot tell the message of this ${errorClass}` +
          `${unread === undefined ? "" : `, read as \`${unread}\``}: write it as a literal or a template`,
      );
    }
    return skeletons;
  }

  /** Another error's: `error.message`, with no more than its place in front, the `message` or `error` of a record. */
  async #isAnother(message: Node): Promise<boolean> {
    if (isPropertyAccessExpression(message)) return textOf(message.name) === "message";
    if (isTemplateExpression(message)) {
      const { expression, literal } = message.templateSpans.at(-1)!;
      const words = [message.head, ...message.templateSpans.map((span) => span.literal)].map(({ text }) =>
        text
      );
      return literal.text === "" && /^(?:error: )?\s*$/.test(words.join("")) &&
        await this.#isAnother(expression);
    }
    if (isCallExpression(message)) return textOf(message.expression) === "String";
    const declaration = isIdentifier(message) ? await this.#declaration(message) : undefined;
    return declaration !== undefined && isBindingElement(declaration) &&
      ["message", "error"].includes(textOf(declaration.name!));
  }

  /**
   * What an expression can be, with gaps for what is not written down; undefined when nothing of it is.
   * @param seen declarations that are being read, which end a recursion
   */
  async #texts(node: Node, seen: readonly Node[]): Promise<string[] | undefined> {
    if (isStringLiteral(node) || isNoSubstitutionTemplateLiteral(node)) return [node.text];
    if (isTemplateExpression(node)) {
      let texts = [node.head.text];
      for (const { expression, literal } of node.templateSpans) {
        // What begins a sentence is what it is about, what is in quotes a name.
        const isName = texts.includes("") && await this.#isParameter(expression) ||
          texts.some((text) => /["`]$/.test(text)) && /^["`]/.test(literal.text);
        const isValue = isName || isCallExpression(expression);
        const values = isValue ? [GAP] : await this.#value(expression, seen);
        texts = joined(texts, joined(values, [literal.text]));
      }
      return texts;
    }
    if (isBinaryExpression(node) && node.operatorToken.kind === SyntaxKind.PlusToken) {
      return joined(
        await this.#texts(node.left, seen) ?? [GAP],
        await this.#texts(node.right, seen) ?? [GAP],
      );
    }
    if (isConditionalExpression(node)) return await this.#any([node.whenTrue, node.whenFalse], seen);
    if (isParenthesizedExpression(node) || isAsExpression(node) || isNonNullExpression(node)) {
      return await this.#texts(node.expression, seen);
    }
    if (isCallExpression(node)) {
      const text = rewordedText(node);
      return await (text ? this.#texts(text, seen) : this.#returned(node, seen));
    }
    return isIdentifier(node) ? await this.#named(node, seen) : undefined;
  }

  async #any(nodes: readonly (Node | undefined)[], seen: readonly Node[]): Promise<string[] | undefined> {
    const texts = await Promise.all(nodes.map((node) => node && this.#texts(node, seen)));
    return texts.every((text) => text === undefined) ? undefined : texts.flatMap((text) => text ?? [GAP]);
  }

  /** A value within a message: its words where any of them is a phrase, as of a parameter `why`, otherwise a gap. */
  async #value(node: Node, seen: readonly Node[]): Promise<string[]> {
    const texts = await this.#texts(node, seen);
    return [...new Set(texts?.map((text) => isPhrase(text) ? text : GAP) ?? [GAP])];
  }

  async #isParameter(node: Node): Promise<boolean> {
    const declaration = isIdentifier(node) ? await this.#declaration(node) : undefined;
    return declaration !== undefined && isParameterDeclaration(declaration);
  }

  async #named(node: Identifier, seen: readonly Node[]): Promise<string[] | undefined> {
    const declaration = await this.#declaration(node);
    if (!declaration || seen.includes(declaration)) return undefined;
    const path = [...seen, declaration];
    if (isVariableDeclaration(declaration)) {
      const { initializer } = declaration;
      return initializer && isIdentifier(declaration.name) ? await this.#texts(initializer, path) : undefined;
    }
    if (!isParameterDeclaration(declaration) || !isIdentifier(declaration.name)) return undefined;
    return await this.#any(await this.#given(declaration), path);
  }

  /** What the function of a call gives back: its `return`s. */
  async #returned({ expression }: { readonly expression: Node }, seen: readonly Node[]) {
    const found = isIdentifier(expression) ? await this.#declaration(expression) : undefined;
    const declaration = found && isVariableDeclaration(found) ? found.initializer : found;
    if (!declaration || seen.includes(declaration)) return undefined;
    if (!isFunctionDeclaration(declaration) && !isArrowFunction(declaration)) return undefined;
    const { body } = declaration;
    if (!body) return undefined;
    if (!isBlock(body)) return await this.#texts(body, [...seen, declaration]);
    const returns = [...descendants(body)].filter(isReturnStatement)
      .filter((statement) => ancestor(statement, isFunction) === declaration);
    return await this.#any(returns.flatMap((statement) => statement.expression ?? []), [
      ...seen,
      declaration,
    ]);
  }

  /** Where a name comes from: a variable, a parameter or a function, in this file or in another of src. */
  #declaration(node: Identifier): Promise<Node | undefined> {
    return remembered(this.#declarations, node, async () => {
      const { checker } = this.#project;
      const symbol = await checker.getSymbolAtLocation(node);
      if (!symbol) return undefined;
      const target = symbol.flags & SymbolFlags.Alias ? await checker.getAliasedSymbol(symbol) : symbol;
      const declaration = await target.valueDeclaration?.resolve(this.#project);
      return declaration && this.#isSource(declaration.getSourceFile().fileName) ? declaration : undefined;
    });
  }

  /** What callers hand over for a parameter; undefined where that cannot be seen. */
  async #given(parameter: ParameterDeclaration): Promise<(Node | undefined)[]> {
    const owner = parameter.parent;
    const index = [...(owner as unknown as { parameters: Iterable<Node> }).parameters].indexOf(parameter);
    const calls = await this.#calls(owner);
    return calls.map((call) => call[index] ?? parameter.initializer);
  }

  /** The arguments of every call of a function, through whatever name it is called. */
  async #calls(called: Node): Promise<(readonly Node[])[]> {
    if (isConstructorDeclaration(called)) {
      const { name } = ancestor(called, isClassDeclaration)!;
      return await this.#callsOf(name!);
    }
    if (isFunctionDeclaration(called) || isMethodDeclaration(called)) {
      return await this.#callsOf(called.name!);
    }
    const { parent } = called;
    if (isVariableDeclaration(parent)) return await this.#callsOf(parent.name);
    if (isCallExpression(parent)) return await this.#throughParameter(parent, called);
    return [];
  }

  async #callsOf(name: Node): Promise<(readonly Node[])[]> {
    const found: (readonly Node[])[] = [];
    for (const node of await this.#referencesTo(name)) {
      const callee = isPropertyAccessExpression(node.parent) && node.parent.name === node
        ? node.parent
        : node;
      const { parent } = callee;
      if ((isCallExpression(parent) || isNewExpression(parent)) && parent.expression === callee) {
        found.push([...parent.arguments ?? []]);
      } else if (isCallExpression(parent)) {
        found.push(...await this.#throughParameter(parent, callee));
      } else if (
        !isPassive(parent, node)
      ) {
        found.push([]); // called somewhere, with who knows what
      }
    }
    return found;
  }

  /** The calls of a function that is an argument of another call. */
  async #throughParameter(call: Node, argument: Node): Promise<(readonly Node[])[]> {
    const signature = await this.#project.checker.getResolvedSignature(call);
    const declaration = await signature?.declaration?.resolve(this.#project);
    if (!declaration || !this.#isSource(declaration.getSourceFile().fileName)) return [];
    const index = [...(call as unknown as { arguments: Iterable<Node> }).arguments].indexOf(argument);
    const { parameters } = declaration as unknown as { parameters: readonly ParameterDeclaration[] };
    const parameter = parameters[index];
    return parameter ? await this.#callsOf(parameter.name) : [];
  }

  #referencesTo(name: Node): Promise<Node[]> {
    return remembered(this.#references, name, async () => {
      const position = name.getStart(name.getSourceFile());
      const entries = await this.#project.checker.getReferencedSymbolsForNode(name, position);
      const handles = entries.flatMap(({ references }) => references);
      const nodes = await Promise.all(handles.map((handle) => handle.resolve(this.#project)));
      return nodes.filter((node) => node !== undefined)
        .filter((node) => this.#isSource(node.getSourceFile().fileName));
    });
  }

  #where(node: Node): string {
    const file: SourceFile = node.getSourceFile();
    const line = file.text.slice(0, node.getStart(file)).split("\n").length;
    return `${relative(this.#root, file.fileName)}:${line}`;
  }
}

function remembered<T>(known: Map<Node, Promise<T>>, node: Node, find: () => Promise<T>): Promise<T> {
  const found = known.get(node) ?? find();
  known.set(node, found);
  return found;
}

/** `Object.assign(error, { code })`: one like the system's. */
function isGivenCode(node: Node): boolean {
  const { parent } = node;
  return isCallExpression(parent) && textOf(parent.expression) === "Object.assign" &&
    parent.arguments.slice(1).some((given) => /\bcode\b/.test(textOf(given)));
}

/** The text of `printable(text)`: what a function makes of a single text has its words. */
function rewordedText(node: Node): Node | undefined {
  if (!isCallExpression(node) || node.arguments.length !== 1) return undefined;
  return node.arguments.find(isText);
}

function isText(node: Node): boolean {
  return isStringLiteral(node) || isNoSubstitutionTemplateLiteral(node) || isTemplateExpression(node);
}

/** A name where it is declared, imported, tested for or used as a type: nothing is called. */
function isPassive(parent: Node, name: Node): boolean {
  return (parent as { name?: Node }).name === name || isImportSpecifier(parent) ||
    isExportSpecifier(parent) ||
    isTypeReferenceNode(parent) ||
    isBinaryExpression(parent) && parent.operatorToken.kind === SyntaxKind.InstanceOfKeyword;
}

function* descendants(node: Node): Generator<Node> {
  const children: Node[] = [];
  node.forEachChild((child) => void children.push(child));
  for (const child of children) {
    yield child;
    yield* descendants(child);
  }
}

function ancestor<T extends Node>(node: Node, is: (node: Node) => node is T): T | undefined {
  for (let at: Node | undefined = node.parent; at; at = at.parent) if (is(at)) return at;
  return undefined;
}

function isFunction(node: Node): node is Node {
  return isArrowFunction(node) || isFunctionDeclaration(node) || isMethodDeclaration(node);
}

/** Every first part with every second one. */
function joined(firsts: readonly string[], seconds: readonly string[]): string[] {
  return firsts.flatMap((first) => seconds.map((second) => first + second));
}

/** Several words say something; `…: rows`, `length` and `an array` only name it. */
function isPhrase(text: string): boolean {
  const words = text.split(/\s+/).filter((word) => /[A-Za-z]{2,}/.test(word) && !/^(?:an|the)$/.test(word));
  return words.length >= 2 || /^[a-z]+ …$/.test(text);
}

/** On one line, with one gap where several meet. */
function tidy(text: string): string {
  return text.replace(/\s+/g, " ").replace(/…(?:…)+/g, GAP).trim();
}

function textOf(node: Node): string {
  return isIdentifier(node) || isStringLiteral(node) ? node.text : node.getText(node.getSourceFile());
}
