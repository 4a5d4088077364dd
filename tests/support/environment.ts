/** Variables of this process's environment that a test sets, so that nothing of the machine's comes through. */
export interface TestEnvironment {
  /** Removes the variables. */
  clear(): void;
  /** Sets them to what they were when this was made. */
  restore(): void;
}

/** @param names which variables */
export function withEnvironment(names: RegExp): TestEnvironment {
  const own = () => Object.keys(process.env).filter((name) => names.test(name));
  const before = Object.fromEntries(own().map((name) => [name, process.env[name]]));
  const clear = () => {
    for (const name of own()) delete process.env[name];
  };
  return {
    clear,
    restore: () => {
      clear();
      Object.assign(process.env, before);
    },
  };
}
