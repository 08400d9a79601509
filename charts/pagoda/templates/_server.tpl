{{/* The template of the pods that are asked: those of the Deployment, or the heads. */}}

{{- define "pagoda.serverPodTemplate" -}}
metadata:
  labels: {{- include "pagoda.podLabels" . | nindent 4 }}
  annotations:
    # Settings are read at start: a change of the file is a new pod.
    checksum/config: {{ include "pagoda.configFile" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- include "pagoda.podSpec" (list .) | nindent 2 }}
  containers:
    - name: pagoda
      image: {{ include "pagoda.image" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: [serve, --config, /etc/pagoda/pagoda.json]
      env: {{- include "pagoda.serverEnvironment" . | nindent 8 }}
      ports:
        - name: http1
          containerPort: {{ int .Values.network.httpPort }}
        - name: h2c
          containerPort: {{ int .Values.network.grpcPort }}
        {{- if eq .Values.mode "multiNode" }}
        - name: ray
          containerPort: 6379
        {{- end }}
      {{- include "pagoda.probes" . | nindent 6 }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ .Values.rollout.preStopSeconds | int | toString | quote }}]
      resources: {{- include "pagoda.resources" . | nindent 8 }}
      securityContext: {{- include "pagoda.rankSecurityContext" . | nindent 8 }}
      volumeMounts: {{- include "pagoda.serverVolumeMounts" . | nindent 8 }}
{{- end -}}
